"""The Triton kernels against the reference: natively on a GPU, else in Triton's interpreter on the CPU.

The interpreter must be chosen before anything imports Triton, so ``test_kernels_without_gpu.py`` runs this file anew.
"""

import math
import os
from functools import partial

import pytest
import torch

from qgalore.errors import ConfigError
from qgalore.lowrank.layers.linear import LowRankLinear
from qgalore.lowrank.subspace.refresh import RefreshOptions
from qgalore.lowrank.subspace.schedule import LazySchedule
from qgalore.lowrank.tensors.attaching import attach
from qgalore.lowrank.tensors.projected import ProjectedTensor
from qgalore.quant import basis, dispatch, int8, int8_products
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


class Stored:
    """A stored basis, as ``dispatch.merge`` takes it."""

    def __init__(self, vectors, fmt="int4"):
        self.dim, self.fmt = vectors.shape[1], fmt
        self.codes, self.scale = basis.encode(vectors, fmt)

    def columns(self):
        return basis.decode(self.codes, self.scale, self.dim, self.fmt).T


def both_ways(q, scale, delta, left, right, **how):
    """What kernels and what the reference make of copies of a weight: [codes, scales] of each."""
    found = []
    for choice in ("triton", "reference"):
        dispatch.use(choice, DEVICE)
        weight = [q.clone(), None if scale is None else scale.clone()]
        dispatch.merge(*weight, delta, left, right, **how)
        found.append(weight)
    dispatch.use("triton", DEVICE)
    return found


def case(shape, rank, side, *, exact, fmt="int4"):
    """A weight and an update of a few integer steps; ``exact``: every product and sum is exact in fp32, and every
    factor in bf16."""
    rows, width, group = shape
    q, scale = int8.quantize(randn(rows, width), width if group == "row" else group)
    dim, inner = (rows, width) if side == "left" else (width, rows)
    values = integers(rank, dim, top=7, seed=1) if exact else randn(rank, dim, seed=1)
    values[:, 0] = 7.0
    if exact:
        values[:, :: basis.group_size_for(dim)] = 7.0  # scales of exactly 1
    delta = integers(rank, inner, top=5, seed=2) * 2.0**-10 if exact else randn(rank, inner, seed=2) * 1e-3
    stored = Stored(values, fmt)
    sides = (stored, None) if side == "left" else (None, stored)
    return q, scale, (delta if side == "left" else delta.T).contiguous(), *sides


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", [*SHAPES, (3, 33, "row"), (66, 96, "row"), (2, 4224, "row")])
@pytest.mark.parametrize(("rank", "shrink", "s"), [(3, 0.0, 0.25), (40, 0.01, 64.0)])
def test_merge_is_the_reference_where_sums_are_exact(shape, side, rank, shrink, s):
    got, wanted = both_ways(*case(shape, rank, side, exact=True), s=s, shrink=shrink, key=derive_key(3, 4, 5))
    assert same(got, wanted)


def test_a_row_grid_is_merged_alike_in_however_many_pieces(monkeypatch):
    """Pieces of 64 rows, the last of them not whole; random bits are those of the whole weight."""
    from qgalore.quant import kernels_write

    monkeypatch.setattr(kernels_write, "PRODUCT_ELEMENTS", 64 * 96)
    for side in ("left", "right"):
        weight = case((80, 96, "row"), 5, side, exact=True)
        assert same(*both_ways(*weight, s=0.25, shrink=0.01, key=derive_key(9), first_row=7))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", [SHAPES[2], (33, 192, "row")])
def test_merge_is_the_reference_given_its_product(shape, side):
    """The scales go into Δ, which is rounded to bf16; with the product of these factors the rest is the reference's,
    but for the order of fp32 sums."""
    q, scale, delta, left, right = case(shape, 48, side, exact=False)
    stored = left or right
    unit = stored.scale.float().repeat_interleave(stored.dim // stored.scale.shape[1], dim=1)
    codes = torch.round(stored.columns().T / unit.clamp_min(1e-30))
    per_group, size = stored.scale.float(), stored.dim // stored.scale.shape[1]
    parts = []
    for place, group in enumerate(codes.split(size, dim=1)):
        factor = per_group[:, place]
        small = (delta * factor if side == "right" else delta * factor[:, None]).bfloat16().double()
        parts.append(small @ group.double() if side == "right" else group.double().T @ small)
    product = torch.cat(parts, dim=1 if side == "right" else 0).float()
    got = q.clone(), scale.clone()
    how = {"s": 0.25, "shrink": 0.01, "key": derive_key(3)}
    dispatch.merge(*got, delta, left, right, **how)
    int8.write_back(q, scale, lambda a, b: product[a:b] * how["s"], shrink=how["shrink"], key=how["key"])
    assert torch.equal(got[1], scale)
    # Sums in another order differ by some 2⁻²⁰ of a step, and that is the chance that a rounding falls otherwise.
    assert float((got[0] != q).float().mean()) <= 1e-3
    assert int((got[0].int() - q.int()).abs().max()) <= 1


# The factor of a term is rounded to 8 significant bits: by at most 2⁻⁸, evenly spread, of a number between 1 and 2
# whose logarithm is evenly spread too. Its root mean square is 2⁻⁸ / √3 · √(3 / (8 ln 2)).
BF16_ERROR = 2.0**-8 / 3**0.5 * (3 / (8 * math.log(2))) ** 0.5


def product_and_exact(delta, stored, side):
    """Δ Pᵀ or P Δ as the kernel multiplies, and in fp64."""
    from qgalore.quant import kernels_write as kernels

    rows, width = (stored.dim, delta.shape[1]) if side == "left" else (delta.shape[0], stored.dim)
    tile = kernels.merge_tile(side, 128, True)
    grid = (-(-rows // tile["rows"]), -(-width // tile["columns"]))
    out = torch.empty(rows, width, device=DEVICE)
    shape = (rows, width, stored.codes.shape[0], stored.codes.shape[1], 128, stored.scale.shape[1], 0)
    how = {"on_left": side == "left", "operand": kernels.operand_for(DEVICE), **tile}
    kernels._product_kernel[grid](out, delta, stored.codes, stored.scale, *shape, **how)
    columns = stored.columns().double()
    return out.double(), columns @ delta.double() if side == "left" else delta.double() @ columns.T


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["Gaussian", "the first step of Adam"])
def test_a_products_error_is_below_a_fiftieth_of_the_roundings_noise(side, kind):
    stored = Stored(torch.linalg.qr(randn(128, 64)).Q.T.contiguous())
    delta = randn(64, 256, seed=1) if kind == "Gaussian" else randn(64, 256, seed=1).sign() * 1.37
    got, exact = product_and_exact((delta if side == "left" else delta.T).contiguous(), stored, side)
    size, error = exact.square().mean().sqrt(), (got - exact).square().mean().sqrt()
    assert float(error / size) == pytest.approx(BF16_ERROR, rel=0.25)
    for steps in (0.05, 0.5, 4.0):  # the size of a change, in steps of the grid
        part = (exact / size * steps) % 1.0
        noise = (part * (1.0 - part)).mean().sqrt()
        assert float(error / size * steps / noise) < 1 / 50
    assert BF16_ERROR * 4.9 * 6**0.5 < 1 / 50  # of the noise √(1/6) that a change of some steps meets


@pytest.mark.parametrize("side", ["left", "right"])
def test_merge_is_unbiased(side):
    """A constant update of 0.3 steps of 4,096 equal weights: the mean moves by 0.3 within four deviations."""
    q = torch.full((64, 64), 100, dtype=torch.int8, device=DEVICE)
    scale = torch.full((64, 1), 0.5, dtype=torch.bfloat16, device=DEVICE)
    stored = Stored(torch.full((1, 64), 7.0, device=DEVICE))
    delta = torch.full((1, 64) if side == "left" else (64, 1), 0.3 * 0.5 / 7.0, device=DEVICE)
    sides = (stored, None) if side == "left" else (None, stored)
    dispatch.merge(q, scale, delta, *sides, s=1.0, shrink=0.0, key=derive_key(1))
    moved = q.float().mean() - 100
    # Δ is rounded to bf16, by 2⁻⁸ of it at most.
    assert abs(float(moved) - 0.3) < 4 * (0.3 * 0.7 / 4096) ** 0.5 + 0.3 * 2**-8
    assert set(q.unique().tolist()) == {100, 101}


def test_without_an_update_nothing_changes():
    for group in (64, "row"):
        q, scale, delta, *sides = case((8, 128, group), 4, "right", exact=False)
        before = q.clone(), scale.clone()
        dispatch.merge(q, scale, torch.zeros_like(delta), *sides, s=1.0, shrink=0.0, key=(1, 2))
        assert same((q, scale), before)


@pytest.mark.parametrize("fmt", ["int4", "nf4", "bf16", "fp32"])
@pytest.mark.parametrize("side", ["left", "right", "full"])
@pytest.mark.parametrize("group", [32, "row"])
def test_every_basis_and_grid_is_written_by_a_kernel(fmt, side, group):
    """One that no kernel multiplies is multiplied by PyTorch; the integers are the reference's, or a step aside."""
    q, scale, delta, left, right = case((40, 96, group), 8, "left" if side == "full" else side, exact=False, fmt=fmt)
    if side == "full":
        right, delta = Stored(randn(8, 96, seed=5), fmt), randn(8, 8, seed=6) * 1e-3
    got, wanted = both_ways(q, scale, delta, left, right, s=0.25, shrink=0.0, key=derive_key(5))
    moved = (got[0].int() - wanted[0].int()).abs()
    assert int(moved.max()) <= 1
    # Where the kernel multiplies, bf16 moves a value by a few per mille of its change, which is some steps here.
    assert float(moved.float().mean()) <= (0.02 if fmt == "int4" else 1e-3)
    assert not torch.equal(got[0], q)


@pytest.mark.parametrize("group", [128, 32, "row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shrink", "s", "first"), [(0.0, 1.0, 0), (0.01, -0.3, 11), (0.0, 40.0, 11_184_770)])
def test_writing_an_update_back_is_the_reference(group, dtype, shrink, s, first):
    """Scales that stay and that move, rows of a larger tensor, numbers of elements beyond 31 bits."""
    q, scale = int8.quantize(randn(37, 384), 384 if group == "row" else group)
    update = (randn(37, 384, seed=1) * 0.02).to(dtype)
    found = []
    for choice in ("triton", "reference"):
        dispatch.use(choice, DEVICE)
        weight = [q.clone(), scale.clone()]
        dispatch.write_back(*weight, update, s=s, shrink=shrink, key=derive_key(6), first_row=first)
        found.append(weight)
    assert same(*found)
    assert not torch.equal(found[0][0], q)
    assert torch.equal(found[0][1], scale) == (s != 40.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shrink", "s"), [(0.0, 1.0), (0.01, -0.3)])
def test_writing_into_floating_point_is_the_reference(dtype, shrink, s):
    weight, update = randn(37, 300).to(dtype), randn(37, 300, seed=1) * 1e-3
    found = []
    for choice in ("triton", "reference"):
        dispatch.use(choice, DEVICE)
        found.append(weight.clone())
        dispatch.write_back(found[-1], None, update, s=s, shrink=shrink, key=derive_key(6), first_row=3)
    assert torch.equal(*found)
    assert not torch.equal(found[0], weight)


@pytest.mark.parametrize("group", [128, "row", None])
def test_rows_that_are_computed_as_they_come_are_written_alike(group, monkeypatch):
    monkeypatch.setattr(dispatch, "KERNEL_ELEMENTS", 16 * 128)
    weight, update = randn(37, 128), randn(37, 128, seed=1) * 0.02
    stored = (weight, None) if group is None else int8.quantize(weight, 128)
    found = []
    for given in (update, lambda a, b: update[a:b].clone()):
        there = [None if part is None else part.clone() for part in stored]
        dispatch.write_back(*there, given, s=0.5, shrink=0.01, key=derive_key(7))
        found.append(there)
    assert torch.equal(found[0][0], found[1][0])


def test_a_write_back_is_one_launch(monkeypatch):
    """Of an embedding's rows, a matrix with the rank of its sides, and a weight in bf16."""
    from qgalore.quant import kernels

    launches = []
    for name in ("write_back", "write_back_dense"):
        right = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, right=right, **k: (launches.append(1), right(*a, **k)))
    for group in (128, "row", None):
        weight = randn(600, 128)
        stored = (weight, None) if group is None else int8.quantize(weight, 128)
        dispatch.merge(*stored, randn(600, 128, seed=1), None, None, s=0.5, shrink=0.0, key=(1, 2))
    assert len(launches) == 3


def test_what_has_no_kernel_is_said():
    with pytest.raises(ConfigError, match="whole row"):
        dispatch.encode(randn(2, 33), "int4")
    q, scale = int8.quantize(randn(8, 64).T.contiguous(), 8)
    with pytest.raises(ConfigError, match="not contiguous"):
        dispatch.write_back(q.T, scale, randn(8, 64), shrink=0.0, key=(1, 2))


@pytest.mark.parametrize(("tokens", "width", "rows"), [(1, 8, 8), (33, 136, 72), (130, 200, 264), (5, 4200, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_integer_products_are_the_reference(tokens, width, rows, dtype):
    """Tokens of very different sizes, among them one of zeros, one beyond fp32's normal numbers, inf and nan."""
    sizes = 10.0 ** torch.linspace(-6, 3, tokens).unsqueeze(1).to(DEVICE)
    x, grad = (randn(tokens, side, seed=side) * sizes for side in (width, rows))
    if tokens > 4:
        x[0], x[1, 3], x[2, 5], x[3] = 0.0, float("inf"), float("nan"), 1e-42
    x, grad, bias = x.to(dtype), grad.to(dtype), randn(rows, seed=9).to(dtype)
    q, scale = int8.quantize(randn(rows, width), width)
    found = []
    for choice in ("triton", "reference"):
        dispatch.use(choice, DEVICE)
        there = [int8_products.output(x, q, scale), int8_products.output(x.view(1, *x.shape), q, scale, bias)[0]]
        there.append(int8_products.input_gradient(grad, q, scale, dtype))
        found.append(there)
    for got, wanted in zip(*found, strict=True):
        seen = wanted.isfinite()
        assert torch.equal(got.isfinite(), seen)
        assert torch.equal(got[seen], wanted[seen])
        assert bool(seen[0].all())


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
    # As above, operands in bf16; other random bits would change a third of all roundings.
    assert float((kernels != reference).float().mean()) <= 0.02


def test_a_kernel_that_is_wrong_is_found_before_it_is_used(monkeypatch):
    from qgalore.quant import kernels

    right = kernels.dequantize
    monkeypatch.setattr(kernels, "dequantize", lambda *args: right(*args).mul_(1 + 2**-6))
    dispatch._obstacle_on.cache_clear()
    with pytest.raises(ConfigError, match="the kernel dequantize differs from the reference"):
        dispatch.use("triton", DEVICE)
    monkeypatch.undo()
    dispatch._obstacle_on.cache_clear()
    dispatch.use("triton", DEVICE)
    assert dispatch.kernels_for(DEVICE) is kernels
