"""Blockwise 8-bit codes for optimizer states: dynamic maps, one absmax for 256 values, rounding to the nearest code.

The format is that of "8-bit Optimizers via Block-wise Quantization" (arXiv 2110.02861, section 2) as bitsandbytes
stores it, so states can be read by either. A code is found without a search: the upper half of a float's bits names a
cell in which the code changes at most once, and one table entry holds both the cell's code and the place of the change.
"""

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

BLOCK = 256
# Values worked on at a time. They stay in a core's cache, and are one block fewer than the 32,768 from which torch
# splits an operation over threads: at this size that gains little, and on busy cores it costs ten times the work.
TILE = 127 * BLOCK
_CELLS = 1 << 16  # sign, 8 exponent and 7 mantissa bits: finer than a dynamic map's narrowest step, 0.9/128 below 1
_TINY = torch.finfo(torch.float32).tiny
# As tensors of the right type: a Python number would be converted in every call, for as long as a shift takes.
_HALF, _SIGN, _LOW_HALF = (torch.tensor(v, dtype=torch.int32, device="cpu") for v in (16, 31, 0xFFFF))


def dynamic_map(signed: bool, decades: int = 7) -> Tensor:
    """The 2^(decades + 1) ascending code values of the dynamic data type, fp32, bitsandbytes' bit for bit.

    They are 0, 1, and in each of (7) decades from 10⁻⁷ to 1 the midpoints of 2, 4, … 128 equal intervals (signed:
    of 1, 2, … 64, with both signs).
    """
    values = [torch.tensor([0.0, 1.0], device="cpu")]  # whatever a program's default device is
    for decade in range(decades):
        edges = torch.linspace(0.1, 1.0, (1 if signed else 2) * 2**decade + 1, device="cpu")
        middles = (edges[:-1] + edges[1:]) / 2.0 * 10 ** (decade + 1 - decades)
        values += [middles, -middles] if signed else [middles]
    return torch.cat(values).sort().values


def nearest_code(x: Tensor, code: Tensor) -> Tensor:
    """Index (int64) of the value of ``code`` (256, ascending) nearest to each of ``x``, the lower one of a tie.

    A map that begins with 0 holds second moments: there a positive value never becomes 0, since a first moment that was
    coded more finely would then be divided by Adam's eps alone. This is the definition of the rounding, by search;
    :func:`quantize_tile` gives the same codes without one.
    """
    right = torch.searchsorted(code, x).clamp_(1, code.numel() - 1)
    nearest = right - (x - code[right - 1] <= code[right] - x).long()
    return torch.where((x > 0) & (code[0] == 0), nearest.clamp(min=1), nearest)


@lru_cache(maxsize=8)
def _cell_table(values: tuple[float, ...]) -> Tensor:
    """For each cell one int32: (code << 16) + 65536 − (where the next code begins) − (the cell's own bits).

    Adding a float's bits leaves its code in bits 16 to 23: the cell's bits cancel, and the lower half carries over from
    the place where the next code begins. In negative cells codes fall as the bits rise; they hold 255 − code.
    """
    code = torch.tensor(values, device="cpu")
    key = torch.arange(_CELLS, dtype=torch.int64, device="cpu")
    flip = torch.where(key < _CELLS // 2, 0, 255)

    def at(low: Tensor) -> Tensor:
        # Everything above 2.0, NaN included, is read as 2.0.
        bits = (((key & _CELLS // 2 - 1) << 16) + low).clamp_(max=0x40000000)
        x = bits.to(torch.int32).view(torch.float32)
        return nearest_code(torch.where(flip == 0, x, -x), code) ^ flip

    low, high = torch.zeros_like(key), torch.full_like(key, _CELLS - 1)
    first = at(low)
    change = at(high) - first
    if not ((change == 0) | (change == 1)).all():
        raise ValueError("two codes of this map lie closer than 2⁻⁷ of their size; such maps are not supported")
    # The interval is halved until high is the first place of the new code.
    for _ in range(16):
        middle = (low + high) // 2
        reached = at(middle) > first
        low, high = torch.where(reached, low, middle + 1).clamp_(max=_CELLS - 1), torch.where(reached, middle, high)
    start = torch.where(change == 1, high, _CELLS)
    entry = ((first << 16) + _CELLS - start - (key << 16)) & 0xFFFFFFFF
    return torch.where(entry >= 1 << 31, entry - (1 << 32), entry).to(torch.int32)


def cell_table(code: Tensor) -> Tensor:
    """The lookup table of the ascending map ``code`` (fp32, (256,)), made once for each map.

    int32 (65536,), or (32768,) for a map without negative values, which codes no negative values.
    Raises ``ValueError`` if the map is finer than the cells.
    """
    table = _cell_table(tuple(code.tolist()))
    return table if code[0] < 0 else table[: _CELLS // 2]


def dequantize_tile(codes: Tensor, absmax: Tensor, code: Tensor, scratch: Tensor, out: Tensor) -> Tensor:
    """``out`` ← the fp32 values of ``codes`` uint8, both (blocks, width).

    ``absmax`` is fp32 (blocks,), ``code`` the map, ``scratch`` an int32 tensor of the same shape. Returns ``out``.
    """
    scratch.copy_(codes)
    torch.index_select(code, 0, scratch.view(-1), out=out.view(-1))
    return out.mul_(absmax.unsqueeze(1))


def quantize_tile(x: Tensor, table: Tensor, codes: Tensor, absmax: Tensor, scratch: list[Tensor]) -> None:
    """``codes`` uint8 (blocks, width) and ``absmax`` fp32 (blocks,) ← finite ``x`` fp32 (blocks, width), destroyed.

    ``table`` is the map's :func:`cell_table`: without negative cells x must hold no negative value, which saves three
    operations. ``scratch`` is two int32 tensors of x's shape. A block under 2⁻¹²⁶ decodes to values nearer to zero.
    """
    index, entry = scratch
    signed = table.numel() == _CELLS
    torch.amax(torch.abs(x, out=entry.view(torch.float32)) if signed else x, dim=1, out=absmax)
    bits = x.mul_(absmax.clamp_min(_TINY).reciprocal_().unsqueeze(1)).view(torch.int32)
    torch.bitwise_right_shift(bits, _HALF, out=index)
    if signed:
        index.bitwise_and_(_LOW_HALF)
    torch.index_select(table, 0, index.view(-1), out=entry.view(-1))
    entry.add_(bits).bitwise_right_shift_(_HALF)
    if signed:
        entry.bitwise_xor_(bits.bitwise_right_shift_(_SIGN))
    # The copy to bytes keeps the low one.
    codes.copy_(entry)


def block_parts(flat: Tensor) -> list[Tensor]:
    """Views (blocks, 256) and, where 256 does not divide the length of ``flat``, (1, rest)."""
    whole = flat.numel() - flat.numel() % BLOCK
    parts = [flat[:whole].view(-1, BLOCK), flat[whole:].view(1, -1)]
    return [part for part in parts if part.numel()]


def tiles(*parts: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Walk together over tensors whose dim 0 counts the blocks of one part, at most ``TILE`` values at a time."""
    return zip(*(part.split(TILE // BLOCK) for part in parts), strict=True)


def block_counts(count: int) -> list[int]:
    """How many blocks each of :func:`block_parts` holds: the sizes to split an absmax by."""
    return [blocks for blocks in (count // BLOCK, int(count % BLOCK > 0)) if blocks]


def quantize(x: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 of x's shape and absmax fp32 (⌈n/256⌉,) for finite fp32 ``x`` on the CPU.

    ``code`` is an ascending map of 256 values. Where it has no negative ones, negative values take its lowest.
    """
    table = cell_table(code)
    codes, absmax = x.new_empty(x.shape, dtype=torch.uint8), x.new_empty(-(-x.numel() // BLOCK))
    sizes = block_counts(x.numel())
    for part in zip(block_parts(x.reshape(-1)), block_parts(codes.view(-1)), absmax.split(sizes), strict=True):
        for values, code_tile, absmax_tile in tiles(*part):
            tile = values.clone() if code[0] < 0 else values.clamp(min=0.0)
            scratch = [torch.empty_like(tile, dtype=torch.int32) for _ in range(2)]
            quantize_tile(tile, table, code_tile, absmax_tile, scratch)
    return codes, absmax


def dequantize(codes: Tensor, absmax: Tensor, code: Tensor) -> Tensor:
    """Values fp32 of the shape of ``codes`` (uint8): ``code[codes] · absmax`` of each block of 256."""
    values = absmax.new_empty(codes.shape)
    sizes = block_counts(codes.numel())
    for part in zip(block_parts(codes.reshape(-1)), absmax.split(sizes), block_parts(values.view(-1)), strict=True):
        for code_tile, absmax_tile, tile in tiles(*part):
            dequantize_tile(code_tile, absmax_tile, code, torch.empty_like(tile, dtype=torch.int32), tile)
    return values
