"""The Triton kernels against the reference: natively on a GPU, else in Triton's interpreter on the CPU.

The interpreter must be chosen before anything imports Triton, so ``test_kernels_without_gpu.py`` runs this file anew.
"""

import os
from functools import partial

import pytest
import torch

from qgalore.errors import ConfigError
from qgalore.lowrank.layers.linear import LowRankLinear
from qgalore.lowrank.subspace.refresh import RefreshOptions
from qgalore.lowrank.subspace.schedule import LazySchedule
from qgalore.lowrank.tensors.base import attach
from qgalore.lowrank.tensors.projected import ProjectedTensor
from qgalore.quant import basis, dispatch, int8
from qgalore.quant.counter import derive_key

pytest.importorskip("triton")
NATIVE = torch.cuda.is_available()
if not NATIVE and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no CUDA device: run by test_kernels_without_gpu.py", allow_module_level=True)

DEVICE = torch.device("cuda" if NATIVE else "cpu")


@pytest.fixture(autouse=True)
def kernels_only():
    dispatch.use("triton", DEVICE)
    yield
    dispatch.use("auto", torch.device("cpu"))


SHAPES = [(5, 128, 128), (3, 96, 32), (40, 192, 64), (33, 384, 128), (1, 32, 32)]


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def integers(*shape, top, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-top, top + 1, shape, generator=generator).float().to(DEVICE)


@pytest.mark.parametrize("shape", [*SHAPES, (7, 33, "row"), (2, 5461, "row")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantize_is_the_reference(shape, dtype):
    q, scale = int8.quantize(randn(*shape[:2]), int8.group_size_for(*shape[1:]))
    assert torch.equal(dispatch.dequantize(q, scale, dtype), int8.dequantize(q, scale, dtype))


@pytest.mark.parametrize("dim", [32, 96, 128, 192, 640])
def test_packing_is_the_reference(dim):
    vectors = randn(5, dim)
    vectors[1] = 0.0
    vectors[2] = integers(dim, top=6, seed=1) + 0.5
    vectors[2, ::32] = 7.0  # a scale of exactly 1: the others are ties
    vectors[3] *= 1e-30
    codes, scale = dispatch.encode(vectors, "int4")
    wanted_codes, wanted_scale = basis.encode(vectors.clone(), "int4")
    assert torch.equal(scale, wanted_scale)
    assert torch.equal(codes, wanted_codes)


@pytest.mark.parametrize("dim", [1, 33, 96, 128, 5461])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unpacking_is_the_reference(dim, dtype):
    codes, scale = basis.encode(randn(3, dim), "int4")
    assert torch.equal(
        dispatch.decode(codes, scale, dim, "int4", dtype), basis.decode(codes, scale, dim, "int4", dtype)
    )


def reference_merge(q, scale, delta, stored, on_left, s, shrink, key):
    vectors = basis.decode(stored[0], stored[1], q.shape[0] if on_left else q.shape[1], "int4")
    product = (vectors.T @ delta if on_left else delta @ vectors).mul_(s)
    int8.write_back(q, scale, lambda a, b: product[a:b], shrink=shrink, key=key)


def case(shape, rank, on_left, *, exact, s):
    """A weight and an update of a few integer steps; ``exact``: every product and sum is exact in fp32."""
    rows, width, group = shape
    q, scale = int8.quantize(randn(rows, width), group)
    dim, inner = (rows, width) if on_left else (width, rows)
    values = integers(rank, dim, top=7, seed=1) if exact else randn(rank, dim, seed=1)
    values[:, 0] = 7.0
    codes, basis_scale = basis.encode(values, "int4")
    delta = integers(rank, inner, top=5, seed=2) * 2.0**-10 if exact else randn(rank, inner, seed=2) * 1e-3
    delta = (delta if on_left else delta.T).contiguous()
    return q, scale, delta, (codes, basis_scale, "int4"), s


def merge_both(shape, rank, on_left, shrink, *, exact, s):
    q, scale, delta, stored, s = case(shape, rank, on_left, exact=exact, s=s)
    sides = (stored, None) if on_left else (None, stored)
    key = derive_key(3, 4, 5)
    got_q, got_scale = q.clone(), scale.clone()
    assert dispatch.fused_merge(got_q, got_scale, delta, *sides, s=s, shrink=shrink, key=key)
    reference_merge(q, scale, delta, stored, on_left, s, shrink, key)
    return got_q, got_scale, q, scale


@pytest.mark.parametrize("on_left", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("rank", "shrink", "s"), [(3, 0.0, 0.25), (40, 0.01, 1.0), (64, 0.0, 64.0)])
def test_merge_is_the_reference_where_sums_are_exact(shape, on_left, rank, shrink, s):
    got_q, got_scale, q, scale = merge_both(shape, rank, on_left, shrink, exact=True, s=s)
    assert torch.equal(got_scale, scale)
    assert torch.equal(got_q, q)


@pytest.mark.parametrize("on_left", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_merge_is_within_a_rounding_step_elsewhere(shape, on_left):
    got_q, got_scale, q, scale = merge_both(shape, 48, on_left, 0.01, exact=False, s=0.25)
    same = (got_scale == scale).repeat_interleave(shape[2], dim=1)
    assert int((got_q.int() - q.int())[same].abs().max()) <= 1
    # Sums in another order differ by some 2⁻²⁰ of a step, and that is the chance that a rounding falls otherwise.
    assert float((got_q != q).float().mean()) <= 1e-3
    assert torch.allclose(got_scale.float(), scale.float(), rtol=2.0**-7)


@pytest.mark.parametrize("on_left", [True, False])
def test_merge_is_unbiased(on_left):
    """A constant update of 0.3 steps of 4,096 equal weights: the mean moves by 0.3 within four deviations."""
    q = torch.full((64, 64), 100, dtype=torch.int8, device=DEVICE)
    scale = torch.full((64, 1), 0.5, dtype=torch.bfloat16, device=DEVICE)
    ones = basis.encode(torch.full((1, 64), 7.0, device=DEVICE), "int4")
    delta = torch.full((1, 64) if on_left else (64, 1), 0.3 * 0.5 / 7.0, device=DEVICE)
    stored = (*ones, "int4")
    sides = (stored, None) if on_left else (None, stored)
    dispatch.fused_merge(q, scale, delta, *sides, s=1.0, shrink=0.0, key=derive_key(1))
    moved = q.float().mean() - 100
    assert abs(float(moved) - 0.3) < 4 * (0.3 * 0.7 / 4096) ** 0.5
    assert set(q.unique().tolist()) == {100, 101}


def test_without_an_update_nothing_changes():
    q, scale = int8.quantize(randn(8, 128), 64)
    before = q.clone(), scale.clone()
    stored = (*basis.encode(randn(4, 128), "int4"), "int4")
    zero = torch.zeros(8, 4, device=DEVICE)
    dispatch.fused_merge(q, scale, zero, None, stored, s=1.0, shrink=0.0, key=(1, 2))
    assert torch.equal(q, before[0])
    assert torch.equal(scale, before[1])


@pytest.mark.parametrize(
    ("width", "both", "fmt", "message"),
    [(33, False, "int4", "whole row"), (64, True, "int4", "either side"), (64, False, "nf4", "nf4")],
)
def test_what_has_no_kernel_is_said(width, both, fmt, message):
    q, scale = int8.quantize(randn(8, width), int8.group_size_for(width))
    right, left = (*basis.encode(randn(2, width), fmt), fmt), (*basis.encode(randn(2, 8), fmt), fmt)
    delta = torch.zeros((2, 2) if both else (8, 2), device=DEVICE)
    with pytest.raises(ConfigError, match=message):
        dispatch.fused_merge(q, scale, delta, left if both else None, right, s=1.0, shrink=0.0, key=(1, 2))


@pytest.mark.parametrize("first", [0, 7, 33_554_400])
def test_rows_of_a_weight_round_as_in_the_whole(first):
    """Row 33,554,400 of 128 columns lies where element numbers need 32 bits, and signed ones do not suffice."""
    rows, width, group = SHAPES[0]
    q, scale, delta, stored, s = case((rows, width, group), 3, False, exact=True, s=0.25)
    got, wanted = (q.clone(), scale.clone()), (q.clone(), scale.clone())
    key, half = derive_key(8), slice(2, None)
    options = {"s": s, "shrink": 0.01, "key": key}
    parts = [t[half] for t in got]
    assert dispatch.fused_merge(*parts, delta[half], None, stored, first_row=first + 2, **options)
    product = (delta @ basis.decode(*stored[:2], width, "int4")).mul_(s)
    whole = [t[half] for t in wanted]
    int8.write_back(*whole, lambda a, b: product[2:][a:b], shrink=0.01, key=key, first_row=first + 2)
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])
    elsewhere = q.clone()
    dispatch.fused_merge(elsewhere[half], scale[half].clone(), delta[half], None, stored, **options, first_row=first)
    assert not torch.equal(elsewhere, got[0])


def test_a_slot_that_steps_in_parts_merges_by_kernels_as_by_the_reference():
    def merged(choice):
        dispatch.use(choice, DEVICE)
        layer = LowRankLinear(randn(96, 64) * 0.1, None, rank=8, group_size=64)
        layer.right.assign(torch.linalg.qr(randn(64, 8, seed=1)).Q)
        slot = ProjectedTensor("layer", 0, layer, LazySchedule(200, 200), RefreshOptions())
        attach([slot], partial(torch.optim.AdamW, lr=1.0, weight_decay=0.0), 32 * 8)
        assert len(slot.parts) == 3
        layer.delta.grad = randn(96, 8, seed=2)
        slot.step(0.01, 0.25, 0.001, derive_key(4))
        return layer.weight.int()

    kernels, reference = merged("triton"), merged("reference")
    assert int((kernels - reference).abs().max()) <= 1
    # As above, sums in another order; other random bits would change a third of all roundings.
    assert float((kernels != reference).float().mean()) <= 1e-3


def test_a_kernel_that_is_wrong_is_found_before_it_is_used(monkeypatch):
    from qgalore.quant import kernels

    right = kernels.merge

    def decays_twice(*args, shrink, **options):
        right(*args, shrink=2 * shrink, **options)

    monkeypatch.setattr(kernels, "merge", decays_twice)
    dispatch._obstacle_on.cache_clear()
    with pytest.raises(ConfigError, match="the kernel merge differs from the reference"):
        dispatch.use("triton", DEVICE)
    monkeypatch.undo()
    dispatch._obstacle_on.cache_clear()
    dispatch.use("triton", DEVICE)
    assert dispatch.kernels_for(DEVICE) is kernels
