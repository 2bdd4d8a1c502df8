"""What a step on whole gradients records of itself, against what was done to the weight."""

import pytest
import torch

from qgalore.lowrank.layers.linear import LowRankLinear
from qgalore.lowrank.rules import RULES, observed
from qgalore.lowrank.rules.common import RuleOptions
from qgalore.lowrank.rules.muon import Muon
from qgalore.lowrank.rules.orthogonal import orthogonalize
from qgalore.lowrank.subspace.refresh import RefreshOptions
from qgalore.lowrank.subspace.schedule import LazySchedule
from qgalore.lowrank.tensors.attaching import attach
from qgalore.lowrank.tensors.whole import WholeTensor

SHAPE = (40, 64)


def tensor_of(rule, weight_format="none", **options):
    torch.manual_seed(0)
    weight = torch.randn(SHAPE) / 8
    module = LowRankLinear(weight, None, rank=None, group_size=64 if weight_format == "int8" else None)
    made = RULES[rule](module, 0, RuleOptions(**options))
    tensor = WholeTensor("layer", 0, module, LazySchedule(base_gap=9, first_gap=9), RefreshOptions(), made)
    attach([tensor], lambda leaves: torch.optim.AdamW(leaves, lr=1.0, weight_decay=0.0), 1 << 30)
    return tensor


def step(tensor, number):
    tensor.arm(number)
    gradient = torch.randn(SHAPE, generator=torch.Generator().manual_seed(number))
    tensor.module.probe.grad = gradient.clone()
    tensor.step(0.01, 2.0, 0.0, (1, number))
    return gradient


@pytest.mark.parametrize("rule", ["muon", "sinkgd", "scale"])
@pytest.mark.parametrize("weight_format", ["none", "int8"])
def test_sizes_are_those_of_the_weight_and_of_its_change(rule, weight_format):
    tensor = tensor_of(rule, weight_format)
    before = tensor.module.dense_weight().clone()
    step(tensor, 0)
    row = tensor.observation().row()
    change = tensor.module.dense_weight() - before
    assert (row["step"], row["layer"], row["shape"]) == (0, "layer", list(SHAPE))
    assert row["weight_rms"] == pytest.approx(float(before.square().mean().sqrt()), rel=1e-4)
    # int8 rounds the change: its noise is up to half a step of 1/127 of a group's largest weight
    wanted = float(change.square().mean().sqrt())
    assert row["update_rms"] == pytest.approx(wanted, rel=1e-4 if weight_format == "none" else 0.05)
    assert tensor.observation() is None, "a step is told of once"


@pytest.mark.parametrize("form", ["4bit", "8bit", "bf16", "fp32"])
def test_the_cosine_is_that_of_the_update_with_the_momentum_as_it_is_stored(form):
    tensor = tensor_of("muon", momentum=form, mu=0.8)
    exact = torch.zeros(SHAPE)
    for number in range(observed.EVERY + 1):
        if number == observed.EVERY:
            exact = tensor.rule.momentum.read(tensor.rule._key(number - 1))
        gradient = step(tensor, number)
        assert (tensor._observation is not None) == (number in (0, observed.EVERY))
        if number < observed.EVERY:
            tensor.observation()
    found = tensor.observation().row()["momentum_cosine"]
    if form == "fp32":
        assert found is None
        return
    exact = 0.8 * exact + gradient
    kept = tensor.rule.momentum.read(tensor.rule._key(observed.EVERY))
    one, other = (orthogonalize(gradient + 0.8 * momentum) for momentum in (exact, kept))
    assert found == pytest.approx(float((one * other).sum() / (one.norm() * other.norm())), abs=2e-5)
    low, high = {"4bit": (0.9, 0.997), "8bit": (0.999, 0.99999), "bf16": (0.9999, 1.0)}[form]
    assert low < found <= high


def test_looking_changes_nothing():
    ends = []
    for every in (1, 10**9):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(observed, "EVERY", every)
            tensor = tensor_of("muon", "int8")
            for number in range(1, 4):
                step(tensor, number)
            looked = tensor.observation() is not None
            ends.append((looked, tensor.module.weight.clone(), *map(torch.clone, tensor.tensors().values())))
    assert [end[0] for end in ends] == [True, False]
    assert all(torch.equal(a, b) for a, b in zip(ends[0][1:], ends[1][1:], strict=True))


def test_a_weight_of_zeros_and_no_gradient_are_told_too():
    tensor = tensor_of("muon")
    tensor.module.weight.data.zero_()
    tensor.module.probe.grad = torch.zeros(SHAPE)
    tensor.step(0.01, 1.0, 0.0, (1, 1))
    row = tensor.observation().row()
    assert (row["update_rms"], row["weight_rms"]) == (0.0, 0.0)
    assert isinstance(tensor.rule, Muon)
