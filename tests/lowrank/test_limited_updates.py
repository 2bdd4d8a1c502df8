"""clip_update_rms: no update of a matrix is larger than asked, and smaller ones are not touched."""

import pytest
import torch
from torch import nn

import qgalore
from qgalore import config
from qgalore.errors import ConfigError
from qgalore.lowrank.rules.common import limited

LEAST = {"model": {"config": "llama_60m"}, "data": {"train": "x.txt"}, "train": {"max_steps": 10, "lr": 0.01}}
RULES = {"fira": {}, "apollo": {"rank": 4}, "apollo_mini": {}, "scale": {}, "muon": {}, "sinkgd": {}}


def rms(tensor):
    return float(tensor.double().square().mean().sqrt())


@pytest.mark.parametrize(("size", "limit"), [(3.0, 0.5), (0.1, 0.5), (0.0, 0.5)])
def test_a_matrix_of_many_tiles_is_scaled_as_one(size, limit):
    """1,200 rows of 1,000 are two tiles of a write-back. The second one's values are ten times as large."""
    values = torch.randn(1200, 1000, generator=torch.Generator().manual_seed(2))
    values[1050:] *= 10
    values *= size / rms(values)
    rows = limited(lambda a, b: values[a:b].clone(), values.shape, limit)
    found = torch.cat([rows(0, 700), rows(700, 1200)])
    if size <= limit:
        assert torch.equal(found, values)
    else:
        assert rms(found) == pytest.approx(limit, rel=1e-5)
        torch.testing.assert_close(found, values * (limit / size), rtol=1e-5, atol=0)


def moved(rule, limit, steps=3):
    """How far each step moved a weight at a rate of 1, in root mean square."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(24, 40, bias=False), nn.Tanh(), nn.Linear(40, 8, bias=False))
    qgalore.convert(model, rank=4 if rule == "fira" else None, weight_format="none")
    how = {"lr": 1.0, "rule": rule, "update_proj_gap": 2, "stepping": "fused", "clip_update_rms": limit}
    optimizer = qgalore.optimizer(model, **how, **RULES[rule])
    found = []
    for _ in range(steps):
        before = model[0].weight.detach().clone()
        model(torch.randn(16, 24)).square().mean().backward()
        optimizer.step()
        found.append(rms(model[0].weight - before))
    return found


@pytest.mark.parametrize("rule", RULES)
def test_a_step_moves_no_weight_further(rule):
    free = moved(rule, 0.0)
    limit = min(free) / 3
    assert moved(rule, limit) == pytest.approx([limit] * 3, rel=1e-3)
    assert moved(rule, 3 * max(free))[0] == free[0]


def parsed(train, lowrank=None, **top):
    return config.parse({**LEAST, "train": {**LEAST["train"], **train}, "lowrank": lowrank or {}, **top}, "t")


def test_what_cannot_be_limited_is_refused():
    with pytest.raises(
        ConfigError, match=r"clip_update_rms is 1; it must be 0 with rule galore, .*clip the global norm"
    ):
        parsed({"clip_update_rms": 1})
    with pytest.raises(ConfigError, match="with a method that has no rule"):
        parsed({"clip_update_rms": 1}, method="adamw")
    model = nn.Sequential(nn.Linear(256, 256))
    qgalore.convert(model, rank=4)
    with pytest.raises(ConfigError, match="with rule galore"):
        qgalore.optimizer(model, lr=0.1, clip_update_rms=0.5)
    with pytest.raises(ConfigError, match="at least 0"):
        qgalore.optimizer(model, lr=0.1, clip_update_rms=-1.0)


@pytest.mark.parametrize("order", ["auto", "layer_major", "batch_major"])
def test_a_global_norm_of_whole_gradients_names_it_as_the_remedy(order):
    with pytest.raises(ConfigError) as error:
        parsed({"order": order, "clip_grad_norm": 1}, {"rule": "apollo"})
    said = str(error.value)
    assert "train.clip_grad_norm: 1: rule apollo needs full gradients" in said
    assert "limit each matrix's update by itself with train.clip_update_rms" in said
    assert parsed({"order": order, "clip_update_rms": 1}, {"rule": "apollo"})
    assert parsed({"order": order, "clip_grad_norm": 1, "full_gradients": "keep"}, {"rule": "apollo"})


def test_a_resumed_run_may_not_change_it():
    saved = parsed({"clip_update_rms": 1}, {"rule": "scale"}).model_dump(mode="json")
    now = parsed({"clip_update_rms": 2}, {"rule": "scale"})
    assert config.differences(saved, now) == ["train.clip_update_rms: 1.0 → 2.0"]
