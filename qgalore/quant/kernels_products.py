"""Triton kernels for the products of integers that ``int8_products`` defines: tokens rounded in one pass, then one
product whose scales, bias and cast are in its epilogue. Integer sums are exact, so that every result is the reference's
bit for bit."""

# Triton compiles the bodies below and gives numbers, shapes and launch options meanings that its annotations lack.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kernels_common import ROUND, TINY, TOP, round_to

TOKENS = {"block": 4096, "num_warps": 8}  # elements of a token that are worked on at a time
PRODUCT = {"rows": 128, "columns": 128, "depth": 64, "num_warps": 8, "num_stages": 3}
_TOGETHER = tl.constexpr(8)  # rows of tiles that are worked on together, so that a GPU's cache serves them all


@triton.jit
def _value(values, scale, at, row, length, inside, scaled: tl.constexpr):
    value = tl.load(values + row * length + at, mask=inside, other=0).to(tl.float32)
    if scaled:
        value *= tl.load(scale + at, mask=inside, other=0).to(tl.float32)
    return value


@triton.jit
def _round_tokens_kernel(values, scale, out, step, length, scaled: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((block,), tl.float32)
    for start in range(0, length, block):
        at = start + tl.arange(0, block)
        size = tl.abs(_value(values, scale, at, row, length, at < length, scaled))
        # A maximum passes over NaN. Here it becomes infinity, so that the token's step is not finite.
        largest = tl.maximum(largest, tl.where(size == size, size, float("inf")))
    peak = tl.max(largest, axis=0)
    unit = tl.maximum(tl.div_rn(peak, tl.full(peak.shape, TOP, tl.float32)), TINY)
    tl.store(step + row, unit)
    for start in range(0, length, block):
        at = start + tl.arange(0, block)
        value = _value(values, scale, at, row, length, at < length, scaled)
        value = tl.where(unit < float("inf"), value, 0.0)
        whole = tl.div_rn(value, tl.broadcast_to(unit, value.shape)) + ROUND - ROUND
        tl.store(out + row * length + at, whole.to(tl.int8), mask=at < length)


@triton.jit
def _int8_product_kernel(
    a, b, step, scale, bias, out, tokens, width, length, transposed: tl.constexpr, scaled: tl.constexpr,
    biased: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr, depth: tl.constexpr,
):  # fmt: skip
    """``out`` (tokens, width) = a · b with the steps of a's rows; b is (width, length) if ``transposed``."""
    tall, wide = tl.cdiv(tokens, rows), tl.cdiv(width, columns)
    strip = tl.program_id(0) // (_TOGETHER * wide)
    begin = strip * _TOGETHER
    height = tl.minimum(tall - begin, _TOGETHER)
    place = tl.program_id(0) - strip * _TOGETHER * wide
    row = (begin + place % height) * rows + tl.arange(0, rows)
    column = (place // height) * columns + tl.arange(0, columns)
    sums = tl.zeros((rows, columns), tl.int32)
    for start in range(0, length, depth):
        k = start + tl.arange(0, depth)
        there = k < length
        left = tl.load(
            a + row.to(tl.int64)[:, None] * length + k[None, :],
            mask=(row < tokens)[:, None] & there[None, :], other=0,
        )  # fmt: skip
        if transposed:
            right = tl.trans(
                tl.load(
                    b + column.to(tl.int64)[:, None] * length + k[None, :],
                    mask=(column < width)[:, None] & there[None, :], other=0,
                )
            )  # fmt: skip
        else:
            right = tl.load(
                b + k.to(tl.int64)[:, None] * width + column[None, :],
                mask=there[:, None] & (column < width)[None, :], other=0,
            )  # fmt: skip
        sums = tl.dot(left, right, sums, out_dtype=tl.int32)
    y = sums.to(tl.float32) * tl.load(step + row, mask=row < tokens, other=0)[:, None]
    if scaled:
        y *= tl.load(scale + column, mask=column < width, other=0).to(tl.float32)[None, :]
    if biased:
        y += tl.load(bias + column, mask=column < width, other=0).to(tl.float32)[None, :]
    inside = (row < tokens)[:, None] & (column < width)[None, :]
    tl.store(out + row.to(tl.int64)[:, None] * width + column[None, :], round_to(y, out.dtype.element_ty), mask=inside)


def round_tokens(values: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``int8_products.round_tokens``, bit for bit, of contiguous floating ``values`` (T, K), times ``scale`` (K,)."""
    tokens, length = values.shape
    out = torch.empty(values.shape, dtype=torch.int8, device=values.device)
    step = torch.empty(tokens, 1, dtype=torch.float32, device=values.device)
    given = (values, values if scale is None else scale, out, step, length, scale is not None)
    _round_tokens_kernel[(tokens,)](*given, **TOKENS, enable_fp_fusion=False)
    return out, step


def int8_product(
    a: Tensor, step: Tensor, b: Tensor, dtype: torch.dtype, *, transposed: bool,
    scale: Tensor | None = None, bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``(a · b) ∘ step ∘ scale + bias`` (T, N) in ``dtype``, summed exactly, then in fp32, rounded once.

    ``a`` int8 (T, K) with ``step`` fp32 (T, 1); ``b`` int8 (K, N) or, ``transposed``, (N, K); ``scale`` and ``bias``
    (N,), of any float dtype. All contiguous, on one device; K is at most ``int8_products.MAX_LENGTH``.
    """
    tokens, length = a.shape
    width = b.shape[0] if transposed else b.shape[1]
    out = torch.empty(tokens, width, dtype=dtype, device=a.device)
    grid = (triton.cdiv(tokens, PRODUCT["rows"]) * triton.cdiv(width, PRODUCT["columns"]),)
    absent = (step if scale is None else scale, step if bias is None else bias)
    kinds = (transposed, scale is not None, bias is not None)
    _int8_product_kernel[grid](
        a, b, step, *absent, out, tokens, width, length, *kinds, **PRODUCT, enable_fp_fusion=False
    )
    return out
