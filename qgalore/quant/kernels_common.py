"""What the Triton kernels share: roundings, random bits, packed numbers, and the write-back of a tile.

Every operation whose rounding decides a stored bit is the reference's. Division is the correctly rounded one, products
and sums are not fused, and random bits are those of ``counter``.
"""

# Triton compiles the bodies below and gives numbers, shapes and launch options meanings that its annotations lack.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

import os

import torch
import triton
import triton.language as tl

from .basis import INT4_MAX
from .int8 import HEADROOM, MAX_SCALE, MIN_SCALE, QMAX

ROUND = tl.constexpr(12582912.0)  # 1.5 · 2²³: adding and subtracting it rounds a small fp32 to an integer
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
_LIMITS = (tl.constexpr(HEADROOM / QMAX), tl.constexpr(MIN_SCALE), tl.constexpr(MAX_SCALE))
_HEADROOM, _MIN_SCALE, _MAX_SCALE = _LIMITS
TOP, TOP4 = tl.constexpr(QMAX), tl.constexpr(INT4_MAX)


def _mend_interpreter() -> None:
    """Let the interpreter of Triton 3.6 work with numpy 2.4 and later. It takes ``int`` of an array of one element and
    one dimension, which numpy refuses now. Triton 3.9 does what is done here."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patched


_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
if os.environ.get("TRITON_INTERPRET") == "1":
    _mend_interpreter()


@triton.jit
def round_to(value, dtype: tl.constexpr):
    """Finite fp32 ``value`` in ``dtype``, to the nearest even, which a GPU does itself but the interpreter does not."""
    if dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        value = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit
def as_factor(value, dtype: tl.constexpr):
    """fp32 ``value`` as a factor of a product in ``dtype``. The interpreter multiplies no bf16, so that there the same
    values stay in fp32."""
    value = round_to(value, dtype)
    if _INTERPRETED:
        value = value.to(tl.float32)
    return value


@triton.jit
def signed_nibbles(byte):
    """The two signed values of each byte, side by side in the last dimension: fp32 (…, 2n)."""
    low = (byte & 15).to(tl.float32) - 8.0
    high = (byte >> 4).to(tl.float32) - 8.0
    return tl.interleave(low, high)


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def bits_of(at, key0, key1):
    """``counter.random_bits`` of the stream's elements ``at`` (int64), as uint32."""
    x = _mix(at.to(tl.uint32) ^ key0.to(tl.uint32, bitcast=True))
    return _mix(x + key1.to(tl.uint32, bitcast=True))


@triton.jit
def _uniform(at, key0, key1):
    """``counter.uniform`` of these bits."""
    return ((bits_of(at, key0, key1) >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07


@triton.jit
def next_scale(peak, old):
    """``int8``'s sticky scale, fp32, for groups whose largest magnitude is ``peak`` in units of the ``old`` scale."""
    fresh = tl.minimum(tl.maximum(peak * old * _HEADROOM, _MIN_SCALE), _MAX_SCALE)
    fresh = round_to(fresh, tl.bfloat16).to(tl.float32)
    return tl.where((peak > TOP) | (peak < TOP // 2), fresh, old)


@triton.jit
def settle(base, change, at, key0, key1):
    """The integers that ``base`` + ``change`` is rounded to, stochastically and once."""
    whole = tl.floor(change)
    whole += (_uniform(at, key0, key1) < change - whole).to(tl.float32)
    return tl.minimum(tl.maximum(base + whole, -TOP), TOP)


@triton.jit
def write_tile(
    q, scale, update, row, column, first_group, height, width, shrink, key0, key1, first_row,
    rows: tl.constexpr, columns: tl.constexpr, group: tl.constexpr,
):  # fmt: skip
    """``int8.write_back`` of one tile of whole groups: ``update`` fp32 (rows, columns) at ``row`` and ``column``, where
    the group ``first_group`` begins."""
    inside = (row < height)[:, None] & (column < width)[None, :]
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    place = first_group + tl.arange(0, columns // group)
    scale_at = row.to(tl.int64)[:, None] * (width // group) + place[None, :]
    has_scale = (row < height)[:, None] & (place < width // group)[None, :]
    old = tl.where(has_scale, tl.load(scale + scale_at, mask=has_scale, other=0).to(tl.float32), 1.0)
    grouped: tl.constexpr = (rows, columns // group, group)
    spread = tl.reshape(tl.broadcast_to(tl.expand_dims(old, 2), grouped), (rows, columns))
    base = tl.load(q + at, mask=inside, other=0).to(tl.float32)
    # Everything is in units of the old scale, in which the stored weights are whole numbers.
    change = tl.div_rn(update, spread)
    if shrink != 0:
        change -= base * shrink
    values = tl.reshape(base + change, grouped)
    new = next_scale(tl.max(tl.abs(values), axis=2), old)
    moved = tl.broadcast_to(tl.expand_dims(new != old, 2), grouped)
    ratio = tl.broadcast_to(tl.expand_dims(tl.div_rn(old, new), 2), grouped)
    change = tl.reshape(tl.where(moved, values * ratio, tl.reshape(change, grouped)), (rows, columns))
    base = tl.reshape(tl.where(moved, 0.0, tl.reshape(base, grouped)), (rows, columns))
    integer = settle(base, change, at + first_row.to(tl.int64) * width, key0, key1)
    tl.store(q + at, integer.to(tl.int8), mask=inside)
    tl.store(scale + scale_at, new.to(tl.bfloat16), mask=has_scale)
