"""The int8 weight grid: symmetric, q in [-127, 127], one bf16 scale for each group along in_features.

A scale is *sticky*: it is set with head-room (1.1 · absmax / 127) and changes only when its group overflows ±127 or has
shrunk below half its range. A weight without an update therefore keeps its integer for ever. Scales are kept in
[2⁻¹⁷, 65280], where every bf16 value is exact in fp16 too, so that one scale serves every inference engine.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .counter import random_bits
from .rounding import to_integer_stochastic

QMAX = 127
HEADROOM = 1.1
MIN_SCALE = 2.0**-17
MAX_SCALE = 65280.0
GROUP_SIZES = (128, 64, 32)
TILE_ELEMENTS = 1 << 20  # 4 MiB of fp32: the working set of a write-back, whatever the weight's size


def group_size_for(width: int, wanted: int | str = 128) -> int:
    """The group size used for rows of ``width`` values: ``wanted`` or the next smaller of 128, 64, 32 that divides
    ``width``, else one group for the whole row (also for ``wanted="row"``)."""
    if wanted == "row":
        return width
    if wanted not in GROUP_SIZES:
        raise ValueError(f"group_size {wanted!r} is not one of {GROUP_SIZES} or 'row'")
    return next((size for size in GROUP_SIZES if size <= wanted and width % size == 0), width)


def scale_for(absmax: Tensor) -> Tensor:
    """bf16 scale with head-room for groups whose largest magnitude is ``absmax`` (fp32, any shape)."""
    return (absmax * (HEADROOM / QMAX)).clamp_(MIN_SCALE, MAX_SCALE).to(torch.bfloat16)


def row_tiles(rows: int, width: int) -> list[tuple[int, int]]:
    """Row ranges (a, b) of about ``TILE_ELEMENTS`` values."""
    step = max(1, TILE_ELEMENTS // width)
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def write_back_tiles(weight: Tensor) -> list[tuple[int, int]]:
    """The row tiles of a write-back; on the meta device, where only memory counts, two that stand for all."""
    tiles = row_tiles(*weight.shape)
    return tiles[:2] if weight.is_meta else tiles


@torch.no_grad()
def quantize(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Round-to-nearest quantization of ``weight`` (out, in), any float dtype, tile by tile.

    Returns ``q`` int8 (out, in) and ``scale`` bf16 (out, in / group_size), unset for a weight on the meta device.
    Raises ``ValueError`` if ``group_size`` does not divide in_features or a value is not finite.
    """
    rows, width = weight.shape
    if width % group_size:
        raise ValueError(f"group_size {group_size} does not divide in_features {width}")
    q = torch.empty(rows, width, dtype=torch.int8, device=weight.device)
    scale = torch.empty(rows, width // group_size, dtype=torch.bfloat16, device=weight.device)
    if weight.is_meta:
        return q, scale
    for a, b in row_tiles(rows, width):
        tile = weight[a:b].to(torch.float32).view(b - a, -1, group_size)
        absmax = tile.abs().amax(dim=2)
        if not torch.isfinite(absmax).all():
            raise ValueError(f"rows {a} to {b - 1} of a weight of shape {tuple(weight.shape)} hold inf or nan")
        scale[a:b] = scale_for(absmax)
        q[a:b] = (tile / scale[a:b].float().unsqueeze(2)).round_().clamp_(-QMAX, QMAX).view(b - a, width)
    return q, scale


def dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weight (out, in) in ``dtype``: q · scale, exact in fp32 (7 + 8 significant bits), rounded once to ``dtype``."""
    groups = scale.shape[1]
    values = q.view(q.shape[0], groups, -1).to(dtype)
    return values.mul_(scale.to(dtype).unsqueeze(2)).view(q.shape)


def _sticky_scale(values: Tensor, scale: Tensor) -> Tensor:
    """New fp32 scales (rows, groups) for ``values`` (rows, groups, size) given in units of the old ones.

    The lower bound is the integer 63, so that a group kept once is kept again after its values were rounded.
    """
    peak = values.abs().amax(dim=2)
    outgrown = (peak > QMAX) | (peak < QMAX // 2)
    return torch.where(outgrown, scale_for(peak * scale).float(), scale)


@torch.no_grad()
def write_back(
    q: Tensor,
    scale: Tensor,
    update_rows: Callable[[int, int], Tensor],
    *,
    shrink: float,
    key: tuple[int, int],
    first_row: int = 0,
) -> None:
    """``W ← SR(W · (1 − shrink) + update)`` in place, in fp32, tile by tile, with one stochastic rounding at the end.

    ``q`` int8 (out, in) and ``scale`` bf16 (out, groups) are the weight; ``update_rows(a, b)`` gives rows a … b−1
    of the update, fp32 (b − a, in); ``shrink`` is lr · weight_decay; ``key`` selects the random bits, indexed by
    element of the whole tensor, in which ``q``'s first row has the number ``first_row``. The sum is formed as (integer,
    small change) wherever the scale stays, so that updates far below fp32's resolution at 127 still count.
    """
    width = q.shape[1]
    groups = scale.shape[1]
    for a, b in write_back_tiles(q):
        old = scale[a:b].float()
        base = q[a:b].float().view(b - a, groups, -1)
        change = update_rows(a, b).view(base.shape) / old.unsqueeze(2)
        if shrink:
            change.sub_(base * shrink)
        values = base + change
        new = _sticky_scale(values, old)
        moved = (new != old).unsqueeze(2)
        if q.device.type != "cpu" or moved.any():  # asking a GPU would wait for it, in every tile
            change = torch.where(moved, values * (old / new).unsqueeze(2), change)
            base = torch.where(moved, 0.0, base)
            scale[a:b] = new.to(torch.bfloat16)
        bits = random_bits(key, (first_row + a) * width, (b - a) * width, q.device).view(base.shape)
        q[a:b] = base.add_(to_integer_stochastic(change, bits)).clamp_(-QMAX, QMAX).view(b - a, width)
