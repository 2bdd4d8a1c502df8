"""Default GaLore against ``lowrank/method.py``, the algorithm written out densely: several steps, with refreshes.

Two layers, one with its basis on the right and one on the left, with 8-bit moments of whole and of broken blocks. Both
sides get the same gradients and random bits. They sum in another order, so that one code in many falls to the other
side of a tie; every mistake in what is computed shows in far more.
"""

import pytest
import torch
from torch import nn

from qgalore import convert, optimizer
from qgalore.lowrank import method
from qgalore.quant.counter import derive_key, random_bits, uniform

SHAPES = ((224, 96), (96, 160))
RANK, GAP, STEPS, SEED = 44, 3, 8, 5
HOW = {"lr": 0.02, "scale": 0.5, "weight_decay": 0.4}


def gradients(shape, seed):
    """One for each step, of a spectrum that falls and turns a little every time; far from ties of singular values."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(n, n, generator=generator)).Q[:, : min(shape)] for n in shape)
    for _ in range(STEPS):
        noise = torch.randn(shape, generator=generator) * 0.02
        yield u @ torch.diag(0.9 ** torch.arange(min(shape))) @ v.T + noise


def by_the_package(limit=None, monkeypatch=None, **options):
    """(weights (STEPS, out, in) of each layer in fp32, the model)."""
    if limit is not None:
        monkeypatch.setattr("qgalore.lowrank.factory.PART_ELEMENTS", limit)
    torch.manual_seed(3)
    model = nn.ModuleList(nn.Linear(width, height, bias=False) for height, width in SHAPES)
    convert(model, rank=RANK, group_size=32)
    how = {"policy": "fixed", "projector": "exact", "update_proj_gap": GAP, "stagger": False, "seed": SEED}
    opt = optimizer(model, **HOW, **{**how, **options})
    seen = [[layer.dense_weight().clone()] for layer in model]
    for together in zip(*(gradients(shape, n) for n, shape in enumerate(SHAPES)), strict=True):
        for layer, g in zip(model, together, strict=True):
            (layer(torch.eye(g.shape[1])).T * g).sum().backward()
        opt.step()
        for layer, kept in zip(model, seen, strict=True):
            kept.append(layer.dense_weight().clone())
    return [torch.stack(kept) for kept in seen], model


def by_the_page(start, scale, number, shape):
    weight = method.Weight(start.double(), scale.double())
    seen = [start]
    for step, g in enumerate(gradients(shape, number)):
        bits = random_bits(derive_key(SEED, step, number), 0, g.numel())
        how = {"lr": HOW["lr"], "scale": HOW["scale"], "decay": HOW["weight_decay"]}
        method.step(weight, g, uniform(bits).view(shape), search=step % GAP == 0, rank=RANK, **how)
        seen.append(weight.values.float())
    return torch.stack(seen), weight


@pytest.mark.parametrize("stepping", ["deferred", "fused"])
def test_default_galore_is_the_page(stepping):
    """Nine in ten thousand weights may differ by a step of the grid; each of the mistakes that ``test_mutations`` tries
    moves a tenth of them or more."""
    torch.manual_seed(3)
    twin = nn.ModuleList(nn.Linear(width, height, bias=False) for height, width in SHAPES)
    convert(twin, rank=RANK, group_size=32)
    found, model = by_the_package(stepping=stepping)
    for number, (layer, shape) in enumerate(zip(model, SHAPES, strict=True)):
        wanted, state = by_the_page(found[number][0], twin[number].weight_scale, number, shape)
        assert not torch.equal(wanted[0], wanted[1])
        for step in range(1, STEPS + 1):
            differing = float((found[number][step] != wanted[step]).float().mean())
            assert differing < 9e-4, f"layer {number}, step {step}: {differing:.2%} of the weights differ"
        stored = layer.right if layer.left is None else layer.left
        assert float((stored.columns() != state.basis).float().mean()) < 9e-4


def test_parts_are_the_page_too(monkeypatch):
    """A limit that splits the first layer's Δ, 224 × 44, by rows. The halves would end inside a block of 256, which the
    moments are coded in: the first part takes 128 rows instead, and nothing differs from the whole."""
    whole, _ = by_the_package()
    parts, _ = by_the_package(5000, monkeypatch)
    assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True))
