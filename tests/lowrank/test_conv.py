"""Convolution kernels: the gradient of Δ is the Tucker core of the kernel's gradient, and the whole step GaLore's."""

import copy

import pytest
import torch
from torch import nn

import qgalore
from qgalore.errors import ConfigError
from qgalore.lowrank.layers.conv import LowRankConv
from qgalore.models.convert import convert  # without a guard: gradients are read, nothing is stepped

SHAPES = {
    "2d": (nn.Conv2d(5, 12, (3, 2), stride=2, padding=1), (4, 5, 9, 8)),
    "2d dilated, no bias": (nn.Conv2d(9, 6, 3, dilation=2, bias=False), (3, 9, 8, 9)),
    "1d": (nn.Conv1d(9, 7, 5, padding=2), (4, 9, 11)),
    "one channel": (nn.Conv2d(1, 8, 3, padding=1), (4, 1, 6, 6)),
}


def pair(name, rank, basis_format="fp32"):
    """A convolution in a module, its converted twin, and an input."""
    torch.manual_seed(0)
    conv, shape = SHAPES[name]
    model = nn.Sequential(copy.deepcopy(conv))
    twin = copy.deepcopy(model)
    convert(twin, rank=rank, convolutions="tucker", basis_format=basis_format)
    assert isinstance(twin[0], LowRankConv)
    return model, twin, torch.randn(shape, requires_grad=True)


def gradients(model, x):
    x.grad = None
    model(x).sin().sum().backward()
    return x.grad.clone()


@pytest.mark.parametrize("name", SHAPES)
def test_values_and_gradients_are_torchs(name):
    """The same calls of the same kernels, so the same bits; at full rank Δ's gradient is the kernel's, flattened."""
    model, twin, x = pair(name, None)
    assert torch.equal(model(x), twin(x))
    assert torch.equal(gradients(model, x), gradients(twin, x))
    assert torch.equal(model[0].weight.grad.flatten(1), twin[0].delta.grad)
    if model[0].bias is not None:
        torch.testing.assert_close(model[0].bias.grad, twin[0].bias.grad)


@pytest.mark.parametrize("name", SHAPES)
def test_the_gradient_of_delta_is_the_tucker_core(name):
    """G ×₁ U₁ᵀ ×₂ U₂ᵀ with U₁, U₂ the leading singular vectors of the unfoldings, found in the first step from G and
    used in the next without it. fp32: five digits."""
    model, twin, x = pair(name, 4)
    layer = twin[0]
    opt = qgalore.optimizer(twin, lr=1e-9, projector="exact", update_proj_gap=50)
    gradients(model, x)
    gradients(twin, x)
    opt.step()
    kernel = model[0].weight.grad
    for basis, mode in ((layer.left, 0), (layer.right, 1)):
        if basis is None:
            assert kernel.shape[mode] <= 4
            continue
        columns = basis.columns() if mode == 0 else basis.channels(torch.float32)
        wanted = torch.linalg.svd(kernel.movedim(mode, 0).flatten(1)).U[:, :4]
        cosines = torch.linalg.svdvals(columns.T @ wanted)
        assert float(cosines.min()) > 1 - 1e-4
    x = torch.randn(x.shape, requires_grad=True)
    model.zero_grad()
    gradients(model, x)
    gradients(twin, x)
    core = model[0].weight.grad
    for basis, mode in ((layer.left, 0), (layer.right, 1)):
        if basis is not None:
            columns = basis.columns() if mode == 0 else basis.channels(torch.float32)
            core = torch.tensordot(columns, core, dims=([0], [mode])).movedim(0, mode)
    assert layer.probe.grad is None
    assert float((core.flatten(1) - layer.delta.grad).norm() / core.norm()) < 1e-5


def test_full_rank_steps_are_adamws_and_low_rank_ones_reach_every_weight():
    """Invariant 1 for kernels; then, with int4 bases that are refreshed, nothing stays."""
    for rank in (None, 3):
        model, twin, x = pair("2d", rank, "int4")
        start = model[0].weight.detach().clone()
        opt = qgalore.optimizer(twin, lr=1e-2, inner="adamw", scale=1.0, weight_decay=0.1, update_proj_gap=2)
        groups = [{"params": [model[0].weight], "weight_decay": 0.1}, {"params": [model[0].bias], "weight_decay": 0.0}]
        reference = torch.optim.AdamW(groups, lr=1e-2)
        for _ in range(8):
            for one, its in ((model, reference), (twin, opt)):
                its.zero_grad()
                gradients(one, x)
                its.step()
        moved = (twin[0].weight.detach() - start.flatten(1)).abs()
        assert float(moved.min()) > 0
        assert opt.refresh_counts()[0] == (0 if rank is None else 4)
        if rank is None:
            gap = (twin[0].weight - model[0].weight.flatten(1)).detach().norm()
            assert float(gap / moved.norm()) < 1e-4


def test_fused_and_deferred_are_the_same_bits():
    results = []
    for stepping in ("fused", "deferred"):
        _, twin, x = pair("2d", 3, "int4")
        opt = qgalore.optimizer(twin, lr=1e-2, scale=1.0, update_proj_gap=3, stepping=stepping)
        for _ in range(7):
            gradients(twin, x)
            opt.step()
        results.append({name: value.clone() for name, value in twin.state_dict().items()})
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_what_cannot_be_projected_stays_and_is_named():
    depthwise = nn.Conv2d(8, 8, 3, groups=8)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), depthwise, nn.Conv2d(8, 8, 3, padding="same"), nn.Conv2d(8, 8, 1))
    report = qgalore.convert(model, rank=2, convolutions="tucker", exclude=["3"])
    assert [layer.name for layer in report.converted] == ["0"]
    assert report.skipped["1"] == "it has 8 groups"
    assert "'same'" in report.skipped["2"]
    assert report.skipped["3"] == "in exclude"
    assert model[1] is depthwise
    with pytest.raises(ConfigError, match="convolutions is 'hosvd'"):
        qgalore.convert(model, rank=2, convolutions="hosvd")


NARROW = {  # kernels one of whose unfoldings is of lower rank than its channels
    "bottleneck": nn.Conv2d(64, 4, 1),
    "the other way": nn.Conv2d(4, 64, 1),
    "few inputs": nn.Conv2d(1, 40, 3),
    "few outputs": nn.Conv1d(40, 2, 3),
}


@pytest.mark.parametrize("projector", ["randomized", "exact"])
@pytest.mark.parametrize("name", NARROW)
def test_each_side_has_the_rank_that_its_unfolding_can_have(name, projector):
    """Rank 16: a 4 × 64 kernel of one position has four directions among its 64 channels, and no more. All of the
    gradient is then kept, so that a step moves what torch's AdamW moves but for the coordinates Adam works in."""
    torch.manual_seed(0)
    conv = copy.deepcopy(NARROW[name])
    out, channels, *positions = conv.weight.shape
    block = conv.weight[0, 0].numel()
    model = nn.Sequential(conv)
    report = qgalore.convert(model, rank=16, convolutions="tucker", basis_format="fp32")
    layer = model[0]
    ranks = [min(16, out, channels * block), min(16, channels, out * block)]
    stored = [None if side is None else side.rank for side in (layer.left, layer.right)]
    assert stored == [r if r < dim else None for r, dim in zip(ranks, (out, channels), strict=True)]
    assert layer.delta.shape == (ranks[0], ranks[1] * block)
    notes = report.converted[0].notes
    assert [f"{used} is used" in note for note, used in zip(notes, [r for r in ranks if r < 16], strict=True)]
    assert "rank 16 is above what a kernel of" in str(report)
    opt = qgalore.optimizer(model, lr=1e-2, inner="adamw", projector=projector, update_proj_gap=2)
    before = layer.weight.detach().clone()
    x = torch.randn(4, channels, *[6] * len(positions))
    for _ in range(5):
        gradients(model, x.requires_grad_())
        opt.step()
    rows = [row for row in opt.events if row["layer"] == "0"]
    lost = [row for row in rows if ranks == [min(out, channels * block), min(channels, out * block)]]
    assert all(row["energy"] == pytest.approx(1.0, abs=1e-4) for row in lost)
    assert all(row["failed"] is None for row in rows)
    assert float((layer.weight - before).abs().min()) > 0


def test_a_refresh_that_fails_first_takes_random_columns_of_the_same_rank(monkeypatch):
    from qgalore.lowrank.subspace import search

    def fail(*_):
        raise torch.linalg.LinAlgError("no")

    monkeypatch.setattr(search, "exact_basis", fail)
    model = nn.Sequential(copy.deepcopy(NARROW["bottleneck"]))
    qgalore.convert(model, rank=16, convolutions="tucker", basis_format="fp32")
    opt = qgalore.optimizer(model, lr=1e-2, inner="adamw", projector="exact")
    gradients(model, torch.randn(4, 64, 6, 6).requires_grad_())
    opt.step()
    assert opt.events[0]["failed"] == "no"
    assert model[0].right.rank == 4
