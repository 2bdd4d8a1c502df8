"""Triton kernels that write an update into a stored weight: a merge's Δ Pᵀ, or an update that is there already.

The product of a merge runs on tensor cores, with bf16 operands and fp32 sums. The codes of P are whole numbers of three
bits, which bf16 holds exactly. Their scales are multiplied into Δ, in fp32, so that one rounding to bf16 is all that a
term suffers. It is off by 2⁻⁸ of the term at most, and by 1.7 · 10⁻³ of it on average. Terms have either sign, so a sum
is off by that share of its usual size. Stochastic rounding alone adds 0.41 of a step to a change of some steps. The
product adds less than a fiftieth of that, for changes of up to 4.9 steps. ``tests/quant/test_kernels.py`` measures it.
A GPU older than Ampere multiplies no bf16; there, operands are fp32.
"""

# Triton compiles the bodies below and gives numbers, shapes and launch options meanings that its annotations lack.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .int8 import GROUP_SIZES
from .kernels_common import as_factor, bits_of, next_scale, settle, signed_nibbles, write_tile

MERGE = {"rows": 64, "columns": 128, "depth": 32, "num_warps": 8, "num_stages": 3}
WRITE = {"rows": 32, "columns": 128, "num_warps": 8}  # every group of 128, 64 or 32 lies in one tile
ROW = {"block": 4096, "num_warps": 8}  # elements of a row that are worked on at a time, where a group is a row
DENSE = {"block": 4096, "num_warps": 8}
PRODUCT_ELEMENTS = 1 << 22  # 16 MiB of fp32, which a GPU's cache holds between the product and its write-back


@triton.jit
def _product(
    delta, codes, basis_scale, top, side, height, width, rank, packed, basis_group, basis_groups,
    on_left: tl.constexpr, operand: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr, depth: tl.constexpr,
):  # fmt: skip
    """Δ Pᵀ or P Δ of the tile that begins at row ``top`` and column ``side``, fp32 (rows, columns). The tile must lie
    within one group of P's vectors."""
    row = top + tl.arange(0, rows)
    column = side + tl.arange(0, columns)
    begin = top if on_left else side
    pair = begin // 2 + tl.arange(0, rows // 2 if on_left else columns // 2)
    place = begin // basis_group
    sums = tl.zeros((rows, columns), tl.float32)
    for start in range(0, rank, depth):
        k = start + tl.arange(0, depth)
        there = k < rank
        byte = tl.load(
            codes + k.to(tl.int64)[:, None] * packed + pair[None, :],
            mask=there[:, None] & (pair < packed)[None, :], other=0x88,
        )  # fmt: skip
        vector = as_factor(signed_nibbles(byte), operand)
        unit = tl.load(basis_scale + k * basis_groups + place, mask=there, other=0).to(tl.float32)
        if on_left:
            small = tl.load(
                delta + k.to(tl.int64)[:, None] * width + column[None, :],
                mask=there[:, None] & (column < width)[None, :], other=0,
            )  # fmt: skip
            small = as_factor(small * unit[:, None], operand)
            sums = tl.dot(tl.trans(vector), small, sums, input_precision="ieee")
        else:
            small = tl.load(
                delta + row.to(tl.int64)[:, None] * rank + k[None, :],
                mask=(row < height)[:, None] & there[None, :], other=0,
            )  # fmt: skip
            small = as_factor(small * unit[None, :], operand)
            sums = tl.dot(small, vector, sums, input_precision="ieee")
    return sums


@triton.jit(do_not_specialize=["s", "shrink", "key0", "key1", "first_row"])
def _merge_kernel(
    q, scale, delta, codes, basis_scale, s, shrink, key0, key1, first_row,
    height, width, rank, packed, basis_group, basis_groups, on_left: tl.constexpr, operand: tl.constexpr,
    group: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr, depth: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    column = tl.program_id(1) * columns + tl.arange(0, columns)
    update = _product(
        delta, codes, basis_scale, tl.program_id(0) * rows, tl.program_id(1) * columns, height, width, rank, packed,
        basis_group, basis_groups, on_left, operand, rows, columns, depth,
    ) * s  # fmt: skip
    write_tile(
        q, scale, update, row, column, tl.program_id(1) * (columns // group), height, width,
        shrink, key0, key1, first_row, rows, columns, group,
    )  # fmt: skip


@triton.jit
def _product_kernel(
    out, delta, codes, basis_scale, height, width, rank, packed, basis_group, basis_groups, first,
    on_left: tl.constexpr, operand: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr, depth: tl.constexpr,
):  # fmt: skip
    """Rows of the product from ``first`` on, a multiple of ``rows``, to memory: for weights with one scale a row."""
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    column = tl.program_id(1) * columns + tl.arange(0, columns)
    sums = _product(
        delta, codes, basis_scale, first + tl.program_id(0) * rows, tl.program_id(1) * columns, height, width, rank,
        packed, basis_group, basis_groups, on_left, operand, rows, columns, depth,
    )  # fmt: skip
    inside = (row < height - first)[:, None] & (column < width)[None, :]
    tl.store(out + row.to(tl.int64)[:, None] * width + column[None, :], sums, mask=inside)


@triton.jit(do_not_specialize=["s", "shrink", "key0", "key1", "first_row"])
def _write_kernel(
    q, scale, update, s, shrink, key0, key1, first_row, height, width,
    group: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    column = tl.program_id(1) * columns + tl.arange(0, columns)
    inside = (row < height)[:, None] & (column < width)[None, :]
    change = tl.load(update + row.to(tl.int64)[:, None] * width + column[None, :], mask=inside, other=0)
    write_tile(
        q, scale, change.to(tl.float32) * s, row, column, tl.program_id(1) * (columns // group), height, width,
        shrink, key0, key1, first_row, rows, columns, group,
    )  # fmt: skip


@triton.jit
def _change(q, update, row, column, inside, width, old, s, shrink):
    """(integers, their change in units of the ``old`` scale) of a part of a row."""
    at = row.to(tl.int64) * width + column
    base = tl.load(q + at, mask=inside, other=0).to(tl.float32)
    value = tl.load(update + at, mask=inside, other=0).to(tl.float32) * s
    change = tl.div_rn(value, tl.broadcast_to(old, value.shape))
    if shrink != 0:
        change -= base * shrink
    return base, change


@triton.jit(do_not_specialize=["s", "shrink", "key0", "key1", "first_row"])
def _write_row_kernel(q, scale, update, s, shrink, key0, key1, first_row, width, block: tl.constexpr):
    """The write-back of a row that has one scale, by one program: it looks for the largest value before it writes."""
    row = tl.program_id(0)
    old = tl.load(scale + row).to(tl.float32)
    largest = tl.zeros((block,), tl.float32)
    for start in range(0, width, block):
        column = start + tl.arange(0, block)
        base, change = _change(q, update, row, column, column < width, width, old, s, shrink)
        largest = tl.maximum(largest, tl.abs(base + change))
    new = next_scale(tl.max(largest, axis=0), old)
    ratio = tl.div_rn(old, new)
    moved = new != old
    for start in range(0, width, block):
        column = start + tl.arange(0, block)
        base, change = _change(q, update, row, column, column < width, width, old, s, shrink)
        change = tl.where(moved, (base + change) * ratio, change)
        base = tl.where(moved, 0.0, base)
        number = (row.to(tl.int64) + first_row) * width + column
        integer = settle(base, change, number, key0, key1)
        tl.store(q + row.to(tl.int64) * width + column, integer.to(tl.int8), mask=column < width)
    tl.store(scale + row, new.to(tl.bfloat16))


@triton.jit(do_not_specialize=["s", "keep", "key0", "key1", "start"])
def _write_dense_kernel(weight, update, s, keep, key0, key1, start, count, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < count
    value = tl.load(weight + at, mask=inside, other=0).to(tl.float32) * keep
    value += tl.load(update + at, mask=inside, other=0).to(tl.float32) * s
    if weight.dtype.element_ty == tl.bfloat16:
        raw = value.to(tl.int32, bitcast=True) + (bits_of(at + start, key0, key1) & 0xFFFF).to(tl.int32)
        value = (raw & -65536).to(tl.float32, bitcast=True)
    tl.store(weight + at, value.to(weight.dtype.element_ty), mask=inside)


@cache
def operand_for(device: torch.device) -> tl.dtype:
    """What the merge multiplies on ``device``: bf16, or fp32 on a GPU whose tensor cores know no bf16."""
    turing = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    return tl.float32 if turing else tl.bfloat16


def merge_tile(side: str, basis_group: int) -> dict[str, int]:
    """The tile of the merge, cut where a group of P's vectors is smaller than that; see ``MERGE``."""
    cut = "rows" if side == "left" else "columns"
    return {**MERGE, cut: min(MERGE[cut], basis_group)} if basis_group in GROUP_SIZES else dict(MERGE)


def merge(
    q: Tensor, scale: Tensor, delta: Tensor, codes: Tensor, basis_scale: Tensor, dim: int, side: str,
    *, s: float, shrink: float, key: tuple[int, int], first_row: int = 0,
) -> None:  # fmt: skip
    """``W ← SR(W · (1 − shrink) + s · Δ Pᵀ)`` in place (``side`` left: s · P Δ), as ``int8.write_back`` defines it.

    ``q`` int8 (out, in), ``scale`` bf16 (out, groups) with groups of 128, 64 or 32 or of a whole row; ``delta`` fp32
    (out, r) or (r, in); ``codes`` uint8 (r, ⌈dim/2⌉) and ``basis_scale`` bf16 (r, groups): P as int4. ``first_row``:
    the number of q's first row in its whole tensor, by which random bits are chosen. No float W and no P is ever
    stored, and of the product only ``PRODUCT_ELEMENTS``, where groups are rows. All contiguous, on one device.
    """
    height, width = q.shape
    on_left = side == "left"
    basis_group = dim // basis_scale.shape[1]
    tile = merge_tile(side, basis_group)
    shape = (codes.shape[0], codes.shape[1], basis_group, basis_scale.shape[1])
    how = {"on_left": on_left, "operand": operand_for(q.device), **tile, "enable_fp_fusion": False}
    group, across = width // scale.shape[1], triton.cdiv(width, tile["columns"])
    if group in GROUP_SIZES:
        grid = (triton.cdiv(height, tile["rows"]), across)
        _merge_kernel[grid](
            q, scale, delta, codes, basis_scale, s, shrink, *key, first_row, height, width, *shape, group=group, **how
        )
        return
    step = max(1, PRODUCT_ELEMENTS // width // tile["rows"]) * tile["rows"]
    product = torch.empty(min(step, height), width, dtype=torch.float32, device=q.device)
    for a in range(0, height, step):
        b = min(a + step, height)
        grid = (triton.cdiv(b - a, tile["rows"]), across)
        _product_kernel[grid](product, delta, codes, basis_scale, b, width, *shape, a, **how)
        write_back(q[a:b], scale[a:b], product[: b - a], s=s, shrink=shrink, key=key, first_row=first_row + a)


def write_back(
    q: Tensor, scale: Tensor, update: Tensor, *, s: float, shrink: float, key: tuple[int, int], first_row: int = 0
) -> None:
    """``W ← SR(W · (1 − shrink) + s · update)`` in place by one kernel, bit for bit as ``int8.write_back`` defines it.

    ``update``: fp32 or bf16 of q's shape; the rest as in :func:`merge`. All contiguous, on one device.
    """
    height, width = q.shape
    group = width // scale.shape[1]
    given = (q, scale, update, s, shrink, *key, first_row)
    if group in GROUP_SIZES:
        grid = (triton.cdiv(height, WRITE["rows"]), triton.cdiv(width, WRITE["columns"]))
        _write_kernel[grid](*given, height, width, group=group, **WRITE, enable_fp_fusion=False)
    else:
        _write_row_kernel[(height,)](*given, width, **ROW, enable_fp_fusion=False)


def write_back_dense(
    weight: Tensor, update: Tensor, *, s: float, shrink: float, key: tuple[int, int], first_row: int = 0
) -> None:
    """``W ← W · (1 − shrink) + s · update`` in place, for an fp32 weight or, rounded stochastically, a bf16 one, as
    ``dense.write_back`` defines it, bit for bit. ``update``: fp32 or bf16 of the weight's shape. Both contiguous."""
    count = weight.numel()
    grid = (triton.cdiv(count, DENSE["block"]),)
    start = first_row * weight.shape[1]
    _write_dense_kernel[grid](weight, update, s, 1.0 - shrink, *key, start, count, **DENSE, enable_fp_fusion=False)
