"""What the project promises of 7B on a 16 GB card: any number of micro-batches, and every rule."""

import pytest

from qgalore import config
from qgalore.training.model import Vocabulary
from qgalore.training.paper import plan_for

GIB = 2**30
AWAY = "train.activation_checkpointing=offload"


def planned(name: str, *overrides: str):
    settings = config.resolve(config.load(name, list(overrides)), "cuda", True)
    return plan_for(settings, Vocabulary(settings.model.overrides["vocab_size"], None, None), "cuda")


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches", [1, 64])
def test_7b_takes_any_number_of_micro_batches(micro_batches):
    """The block inputs are 33 × 16 MiB for each, and as much waits for gradients that go down as for one block."""
    found = planned("llama7b_16gb.yaml", f"train.grad_accumulation={micro_batches}", AWAY)
    assert found.walked
    assert found.total <= 12.8 * GIB
    inputs = (33 + 1) * micro_batches * (16 << 20)
    assert inputs <= found.host_total <= 1.05 * inputs


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["fira", "muon"])
def test_rules_with_whole_gradients_accumulate_in_one_block_more(rule):
    """A block's whole gradient in fp32 is 0.75 GiB."""
    found = planned("llama7b_16gb.yaml", "train.grad_accumulation=8", AWAY, f"lowrank.rule={rule}")
    assert found.total <= 13.4 * GIB
