"""Triton kernels for the formats of ``int8`` and ``basis``, which define what they compute.

Nothing but ``dispatch`` imports this module, and only where Triton is there. This file reads and writes formats.
``kernels_write`` has the write-backs and ``kernels_products`` the products of integers. Under ``TRITON_INTERPRET=1``,
set before Triton is first imported, the kernels run on a CPU.
"""

# Triton compiles the bodies below and gives numbers, shapes and launch options meanings that its annotations lack.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kernels_common import ROUND, TINY, TOP4, round_to, signed_nibbles
from .kernels_products import int8_product, round_tokens
from .kernels_write import merge, write_back, write_back_dense

__all__ = [
    "decode_int4",
    "dequantize",
    "encode_int4",
    "int8_product",
    "merge",
    "round_tokens",
    "write_back",
    "write_back_dense",
]

FLAT = 4096  # elements of one program of an element-wise kernel
SPAN = 2048  # elements of a basis vector that one program unpacks


@triton.jit
def _dequantize_kernel(q, scale, out, count, group: tl.constexpr, block: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * block
    at = start + tl.arange(0, block)
    inside = at < count
    # Only a program's first element is divided in 64 bits, which GPUs do slowly.
    first = start // group
    place = first + ((start - first * group).to(tl.int32) + tl.arange(0, block)) // group
    value = tl.load(q + at, mask=inside, other=0).to(tl.float32)
    value *= tl.load(scale + place, mask=inside, other=0).to(tl.float32)
    tl.store(out + at, round_to(value, out.dtype.element_ty), mask=inside)


@triton.jit
def _unpack_kernel(codes, scale, out, dim, width, group: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    pair = tl.program_id(1) * (block // 2) + tl.arange(0, block // 2)
    byte = tl.load(codes + row * width + pair, mask=pair < width, other=0x88)
    at = tl.program_id(1) * block + tl.arange(0, block)
    inside = at < dim
    unit = tl.load(scale + row * (dim // group) + at // group, mask=inside, other=0).to(tl.float32)
    tl.store(out + row * dim + at, round_to(signed_nibbles(byte) * unit, out.dtype.element_ty), mask=inside)


@triton.jit
def _pack_kernel(vectors, codes, scale, dim, groups, group: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1)
    pair = tl.arange(0, group // 2)
    base = vectors + row * dim + place * group
    low = tl.load(base + 2 * pair)
    high = tl.load(base + 2 * pair + 1)
    peak = tl.max(tl.maximum(tl.abs(low), tl.abs(high)), axis=0)
    unit = round_to(tl.div_rn(peak, tl.full(peak.shape, TOP4, tl.float32)), tl.bfloat16)
    tl.store(scale + row * groups + place, unit)
    divisor = tl.maximum(unit.to(tl.float32), TINY)
    byte = _code(low, divisor) | (_code(high, divisor) << 4)
    tl.store(codes + row * (dim // 2) + place * (group // 2) + pair, byte.to(tl.uint8))


@triton.jit
def _code(value, divisor):
    whole = tl.div_rn(value, tl.broadcast_to(divisor, value.shape)) + ROUND - ROUND
    return (tl.minimum(tl.maximum(whole, -TOP4), TOP4) + 8).to(tl.int32)


def dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``int8.dequantize``, bit for bit, for contiguous ``q`` int8 (out, in) and ``scale`` bf16 (out, groups)."""
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    group = q.shape[1] // scale.shape[1]
    _dequantize_kernel[(triton.cdiv(q.numel(), FLAT),)](q, scale, out, q.numel(), group, FLAT)
    return out


def decode_int4(codes: Tensor, scale: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """``basis.decode`` of an int4 basis, bit for bit: (rank, dim) in ``dtype``."""
    out = torch.empty(codes.shape[0], dim, dtype=dtype, device=codes.device)
    grid = (codes.shape[0], triton.cdiv(dim, SPAN))
    _unpack_kernel[grid](codes, scale, out, dim, codes.shape[1], dim // scale.shape[1], SPAN)
    return out


def encode_int4(vectors: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """``basis.encode`` to int4, bit for bit, for contiguous fp32 (rank, dim) in groups of 128, 64 or 32."""
    rank, dim = vectors.shape
    codes = torch.empty(rank, dim // 2, dtype=torch.uint8, device=vectors.device)
    scale = torch.empty(rank, dim // group, dtype=torch.bfloat16, device=vectors.device)
    _pack_kernel[(rank, dim // group)](vectors, codes, scale, dim, dim // group, group, enable_fp_fusion=False)
    return codes, scale
