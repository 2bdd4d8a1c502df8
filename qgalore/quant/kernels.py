"""Triton kernels for the formats of ``int8`` and ``basis``, which define what they compute.

Nothing but ``dispatch`` imports this module, and only where Triton is there. Every operation whose rounding decides a
stored bit is the reference's: division is the correctly rounded one, products and sums are not fused, and random bits
are those of ``counter``. Only the sum over the rank may be added in another order. Under ``TRITON_INTERPRET=1``, set
before Triton is first imported, the kernels run on a CPU.
"""

# Triton compiles the bodies below and gives numbers, shapes and launch options meanings that its annotations lack.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from .basis import INT4_MAX
from .int8 import HEADROOM, MAX_SCALE, MIN_SCALE, QMAX

_FLAT = 4096  # elements of one program of an element-wise kernel
_ROWS, _COLUMNS, _DEPTH = 32, 128, 32  # of one program of the merge: every group of 128, 64 or 32 lies in one tile
_ROUND = tl.constexpr(12582912.0)  # 1.5 · 2²³: adding and subtracting it rounds a small fp32 to an integer
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
_LIMITS = (tl.constexpr(HEADROOM / QMAX), tl.constexpr(MIN_SCALE), tl.constexpr(MAX_SCALE))
_HEADROOM, _MIN_SCALE, _MAX_SCALE = _LIMITS
_QMAX, _INT4_MAX = tl.constexpr(QMAX), tl.constexpr(INT4_MAX)


def _mend_interpreter() -> None:
    """Let the interpreter of Triton 3.6 work with numpy 2.4 and later. It takes ``int`` of an array of one element and
    one dimension, which numpy refuses now. Triton 3.9 does what is done here."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patched


if os.environ.get("TRITON_INTERPRET") == "1":
    _mend_interpreter()


@triton.jit
def _round_to(value, dtype: tl.constexpr):
    """Finite fp32 ``value`` in ``dtype``, to the nearest even, which a GPU does itself but the interpreter does not."""
    if dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        value = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit
def _dequantize_kernel(q, scale, out, count, group: tl.constexpr, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < count
    value = tl.load(q + at, mask=inside, other=0).to(tl.float32)
    value *= tl.load(scale + at // group, mask=inside, other=0).to(tl.float32)
    tl.store(out + at, _round_to(value, out.dtype.element_ty), mask=inside)


@triton.jit
def _unpack_kernel(codes, scale, out, dim, width, group, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * block + tl.arange(0, block)
    inside = at < dim
    value = _nibble(codes + row * width, at, inside) * tl.load(
        scale + row * (dim // group) + at // group, mask=inside, other=0
    ).to(tl.float32)
    tl.store(out + row * dim + at, _round_to(value, out.dtype.element_ty), mask=inside)


@triton.jit
def _nibble(row, at, inside):
    """Signed values, fp32, of the elements ``at`` of packed rows; 0 outside."""
    byte = tl.load(row + at // 2, mask=inside, other=0x88).to(tl.int32)
    return ((byte >> ((at % 2) * 4)) & 15).to(tl.float32) - 8.0


@triton.jit
def _pack_kernel(vectors, codes, scale, dim, groups, group: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1)
    pair = tl.arange(0, group // 2)
    base = vectors + row * dim + place * group
    low = tl.load(base + 2 * pair)
    high = tl.load(base + 2 * pair + 1)
    peak = tl.max(tl.maximum(tl.abs(low), tl.abs(high)), axis=0)
    unit = _round_to(tl.div_rn(peak, tl.full(peak.shape, _INT4_MAX, tl.float32)), tl.bfloat16)
    tl.store(scale + row * groups + place, unit)
    divisor = tl.maximum(unit.to(tl.float32), _TINY)
    byte = _code(low, divisor) | (_code(high, divisor) << 4)
    tl.store(codes + row * (dim // 2) + place * (group // 2) + pair, byte.to(tl.uint8))


@triton.jit
def _code(value, divisor):
    whole = tl.div_rn(value, tl.broadcast_to(divisor, value.shape)) + _ROUND - _ROUND
    return (tl.minimum(tl.maximum(whole, -_INT4_MAX), _INT4_MAX) + 8).to(tl.int32)


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _uniform(at, key0, key1):
    """``counter.uniform`` of the stream's elements ``at`` (int64)."""
    x = _mix(at.to(tl.uint32) ^ key0.to(tl.uint32, bitcast=True))
    x = _mix(x + key1.to(tl.uint32, bitcast=True))
    return ((x >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07


@triton.jit
def _round_back(base, change, old, at, key0, key1, rows: tl.constexpr, columns: tl.constexpr, group: tl.constexpr):
    """``int8.write_back`` of a tile of whole groups, from (integer, change in units of the old scale)."""
    grouped: tl.constexpr = (rows, columns // group, group)
    values = tl.reshape(base + change, grouped)
    peak = tl.max(tl.abs(values), axis=2)
    fresh = tl.minimum(tl.maximum(peak * old * _HEADROOM, _MIN_SCALE), _MAX_SCALE)
    fresh = _round_to(fresh, tl.bfloat16).to(tl.float32)
    new = tl.where((peak > _QMAX) | (peak < _QMAX // 2), fresh, old)
    moved = tl.broadcast_to(tl.expand_dims(new != old, 2), grouped)
    ratio = tl.broadcast_to(tl.expand_dims(tl.div_rn(old, new), 2), grouped)
    change = tl.reshape(tl.where(moved, values * ratio, tl.reshape(change, grouped)), (rows, columns))
    base = tl.reshape(tl.where(moved, 0.0, tl.reshape(base, grouped)), (rows, columns))
    whole = tl.floor(change)
    whole += (_uniform(at, key0, key1) < change - whole).to(tl.float32)
    return tl.minimum(tl.maximum(base + whole, -_QMAX), _QMAX), new


@triton.jit(do_not_specialize=["s", "shrink", "key0", "key1", "first_row"])
def _merge_kernel(
    q, scale, delta, codes, basis_scale, s, shrink, key0, key1, first_row,
    height, width, rank, packed, basis_group, basis_groups,
    on_left: tl.constexpr, group: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr, depth: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    column = tl.program_id(1) * columns + tl.arange(0, columns)
    in_rows, in_columns = row < height, column < width
    product = tl.zeros((rows, columns), tl.float32)
    for start in range(0, rank, depth):
        k = start + tl.arange(0, depth)
        in_depth = k < rank
        side = row if on_left else column
        in_side = in_rows if on_left else in_columns
        inside = in_depth[:, None] & in_side[None, :]
        vector = _nibble(codes + k.to(tl.int64)[:, None] * packed, side[None, :], inside)
        vector *= tl.load(
            basis_scale + k[:, None] * basis_groups + side[None, :] // basis_group, mask=inside, other=0
        ).to(tl.float32)
        if on_left:
            right = tl.load(
                delta + k.to(tl.int64)[:, None] * width + column[None, :],
                mask=in_depth[:, None] & in_columns[None, :], other=0,
            )  # fmt: skip
            product += tl.dot(tl.trans(vector), right, input_precision="ieee")
        else:
            left = tl.load(
                delta + row.to(tl.int64)[:, None] * rank + k[None, :],
                mask=in_rows[:, None] & in_depth[None, :], other=0,
            )  # fmt: skip
            product += tl.dot(left, vector, input_precision="ieee")
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    inside = in_rows[:, None] & in_columns[None, :]
    place = tl.program_id(1) * (columns // group) + tl.arange(0, columns // group)
    scale_at = row.to(tl.int64)[:, None] * (width // group) + place[None, :]
    has_scale = in_rows[:, None] & (place < width // group)[None, :]
    old = tl.where(has_scale, tl.load(scale + scale_at, mask=has_scale, other=0).to(tl.float32), 1.0)
    grouped: tl.constexpr = (rows, columns // group, group)
    spread = tl.reshape(tl.broadcast_to(tl.expand_dims(old, 2), grouped), (rows, columns))
    base = tl.load(q + at, mask=inside, other=0).to(tl.float32)
    change = tl.div_rn(product * s, spread)
    if shrink != 0:
        change -= base * shrink
    number = at + first_row.to(tl.int64) * width
    integer, new = _round_back(base, change, old, number, key0, key1, rows, columns, group)
    tl.store(q + at, integer.to(tl.int8), mask=inside)
    tl.store(scale + scale_at, new.to(tl.bfloat16), mask=has_scale)


def dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``int8.dequantize``, bit for bit, for contiguous ``q`` int8 (out, in) and ``scale`` bf16 (out, groups)."""
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    group = q.shape[1] // scale.shape[1]
    _dequantize_kernel[(triton.cdiv(q.numel(), _FLAT),)](q, scale, out, q.numel(), group, _FLAT)
    return out


def decode_int4(codes: Tensor, scale: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """``basis.decode`` of an int4 basis, bit for bit: (rank, dim) in ``dtype``."""
    out = torch.empty(codes.shape[0], dim, dtype=dtype, device=codes.device)
    grid = (codes.shape[0], triton.cdiv(dim, _FLAT))
    _unpack_kernel[grid](codes, scale, out, dim, codes.shape[1], dim // scale.shape[1], _FLAT)
    return out


def encode_int4(vectors: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """``basis.encode`` to int4, bit for bit, for contiguous fp32 (rank, dim) in groups of 128, 64 or 32."""
    rank, dim = vectors.shape
    codes = torch.empty(rank, dim // 2, dtype=torch.uint8, device=vectors.device)
    scale = torch.empty(rank, dim // group, dtype=torch.bfloat16, device=vectors.device)
    _pack_kernel[(rank, dim // group)](vectors, codes, scale, dim, dim // group, group, enable_fp_fusion=False)
    return codes, scale


def merge(
    q: Tensor, scale: Tensor, delta: Tensor, codes: Tensor, basis_scale: Tensor, dim: int, side: str,
    *, s: float, shrink: float, key: tuple[int, int], first_row: int = 0,
) -> None:  # fmt: skip
    """``W ← SR(W · (1 − shrink) + s · Δ Pᵀ)`` in place (``side`` left: s · P Δ), as ``int8.write_back`` defines it.

    ``q`` int8 (out, in), ``scale`` bf16 (out, in / group) with a group of 128, 64 or 32; ``delta`` fp32 (out, r) or
    (r, in); ``codes`` uint8 (r, ⌈dim/2⌉) and ``basis_scale`` bf16 (r, groups): P as int4. ``first_row``: the number
    of q's first row in its whole tensor, by which random bits are chosen. Neither the product nor a float W nor P is
    ever stored. All contiguous, on one device.
    """
    height, width = q.shape
    grid = (triton.cdiv(height, _ROWS), triton.cdiv(width, _COLUMNS))
    basis_groups = basis_scale.shape[1]
    _merge_kernel[grid](
        q, scale, delta, codes, basis_scale, s, shrink, *key, first_row, height, width, codes.shape[0],
        codes.shape[1], dim // basis_groups, basis_groups, side == "left", width // scale.shape[1],
        _ROWS, _COLUMNS, _DEPTH, enable_fp_fusion=False,
    )  # fmt: skip
