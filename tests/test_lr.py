from itertools import pairwise

import pytest

from qgalore.training.learning_rate import lr_at

SHAPE = {"peak": 1.0, "warmup_steps": 10, "max_steps": 110, "min_lr_ratio": 0.1}


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_shape(schedule):
    rates = [lr_at(step, schedule=schedule, **SHAPE) for step in range(110)]
    assert all(b > a for a, b in pairwise(rates[:11]))
    assert rates[0] > 0
    assert rates[10] == 1.0
    assert max(rates) == 1.0
    assert rates[-1] == pytest.approx(1.0 if schedule == "constant" else 0.1)
    assert all(b <= a for a, b in pairwise(rates[10:]))


def test_halfway_and_edges():
    assert lr_at(50, schedule="linear", peak=1.0, warmup_steps=0, max_steps=101, min_lr_ratio=0.0) == pytest.approx(0.5)
    assert lr_at(50, schedule="cosine", peak=1.0, warmup_steps=0, max_steps=101, min_lr_ratio=0.0) == pytest.approx(0.5)
    assert lr_at(0, schedule="cosine", peak=1.0, warmup_steps=0, max_steps=1, min_lr_ratio=0.0) == 1.0
    assert lr_at(3, schedule="cosine", peak=1.0, warmup_steps=9, max_steps=5, min_lr_ratio=0.0) == pytest.approx(0.4)
