"""The int8 weight grid: symmetric, q in [-127, 127], one bf16 scale for each group along in_features.

A scale is *sticky*: it is set with head-room (1.1 · absmax / 127) and changes only when its group overflows ±127 or has
shrunk below half its range. A weight without an update therefore keeps its integer for ever. *Rederived* scales, those
of published Q-GaLore, follow their group's range in every write-back: absmax / 127, so that the largest weight lies on
the grid, at ±127. A group without an update keeps its integers then too; one with an update gets a new scale, and all
its weights are rounded anew. Scales are kept in [2⁻¹⁷, 65280], where every bf16 value is exact in fp16 too, so that one
scale serves every inference engine.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .counter import fill_random_bits, ramp, random_bits
from .rounding import add_rounded_, to_bfloat16_stochastic

QMAX = 127
HEADROOM = 1.1
_FOR_SCALES = 0x5CA1E5  # makes of a key, which names the bits of a tensor's weights, the one of its scales' bits
ROUNDINGS = ("stochastic", "nearest")
SCALES = ("sticky", "rederived")
MIN_SCALE = 2.0**-17
MAX_SCALE = 65280.0
GROUP_SIZES = (128, 64, 32)
TILE_ELEMENTS = 1 << 20  # 4 MiB of fp32: what a write-back works on at a time, whatever the weight's size
CACHE_ELEMENTS = 1 << 16  # on a CPU: its six buffers of these stay in a core's second cache


def group_size_for(width: int, wanted: int | str = 128) -> int:
    """The group size used for rows of ``width`` values: ``wanted`` or the next smaller of 128, 64, 32 that divides
    ``width``, else one group for the whole row (also for ``wanted="row"``)."""
    if wanted == "row":
        return width
    if wanted not in GROUP_SIZES:
        raise ValueError(f"group_size {wanted!r} is not one of {GROUP_SIZES} or 'row'")
    return next((size for size in GROUP_SIZES if size <= wanted and width % size == 0), width)


def scale_for(absmax: Tensor, headroom: float = HEADROOM) -> Tensor:
    """bf16 scale with head-room for groups whose largest magnitude is ``absmax`` (fp32, any shape)."""
    return (absmax * (headroom / QMAX)).clamp_(MIN_SCALE, MAX_SCALE).to(torch.bfloat16)


def row_tiles(rows: int, width: int, elements: int | None = None) -> list[tuple[int, int]]:
    """Row ranges (a, b) of about ``elements`` values, or of ``TILE_ELEMENTS``."""
    starts = range(0, rows, max(1, (elements or TILE_ELEMENTS) // width))
    return list(zip(starts, (*starts[1:], rows), strict=False))


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
    # An fp32 copy of the whole weight would be four times its int8 size, so only one tile of rows has one.
    for a, b in row_tiles(rows, width):
        tile = weight[a:b].to(torch.float32).view(b - a, -1, group_size)
        absmax = tile.abs().amax(dim=2)
        if not torch.isfinite(absmax).all():
            raise ValueError(f"rows {a} to {b - 1} of a weight of shape {tuple(weight.shape)} hold inf or nan")
        # The integers are made with the scale as it is stored, so that its rounding to bf16 is compensated.
        scale[a:b] = scale_for(absmax)
        q[a:b] = (tile / scale[a:b].float().unsqueeze(2)).round_().clamp_(-QMAX, QMAX).view(b - a, width)
    return q, scale


def dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weight (out, in) in ``dtype``: q · scale, exact in fp32 (7 + 8 significant bits), rounded once to ``dtype``."""
    groups = scale.shape[1]
    values = q.view(q.shape[0], groups, -1).to(dtype)
    return values.mul_(scale.to(dtype).unsqueeze(2)).view(q.shape)


def _sticky_scale(values: Tensor, scale: Tensor, scratch: Tensor) -> Tensor:
    """New fp32 scales (rows, groups) for ``values`` (rows, groups, size) given in units of the old ones; ``scratch``
    is memory of their shape.

    Their lower bound is the integer 63, so that a group kept once is kept again after it was rounded.
    """
    peak = torch.abs(values, out=scratch).amax(dim=2)
    outgrown = (peak > QMAX) | (peak < QMAX // 2)
    return torch.where(outgrown, scale_for(peak * scale).float(), scale)


def _rederived_scale(
    values: Tensor, scale: Tensor, scratch: Tensor, key: tuple[int, int] | None, start: int
) -> tuple[Tensor, Tensor]:
    """The same for rederived scales, absmax / 127, and which of ``values`` are to become ±127: their group's largest.

    Published Q-GaLore has fp32 scales (arXiv 2407.08296, §3.3 and its code). Ours are bf16, which is rounded
    stochastically: with the largest weight at ±127 of it, that weight too moves by its update on average. Rounded to
    the nearest, it would stay for ever under small updates. A weight next to the largest, within bf16's step of at
    most 0.8 %, may be cut to it. ``key`` and ``start``, the number of the first group in the tensor, select the bits;
    without a key scales are rounded to the nearest.
    """
    peak = torch.abs(values, out=scratch).amax(dim=2)
    exact = peak * scale / QMAX
    if key is None:
        new = exact.to(torch.bfloat16)
    else:
        # A stream of its own: with the bits of the weights, a scale and its weights would be rounded alike.
        bits = random_bits((key[0] ^ _FOR_SCALES, key[1]), start, exact.numel(), exact.device)
        new = to_bfloat16_stochastic(exact, bits.view(exact.shape))
    # Groups of smaller weights do not fill the grid, so their scale is not derived from them.
    derived = (exact >= MIN_SCALE) & (exact <= MAX_SCALE)
    return new.float().clamp_(MIN_SCALE, MAX_SCALE), (scratch >= peak.unsqueeze(2)) & derived.unsqueeze(2)


_planned = "cpu"  # what kind of device tensors on the meta device stand for


@contextmanager
def planned_for(kind: str) -> Iterator[None]:
    """Let :func:`write_back` on the meta device take the memory that it takes on a device of this kind."""
    global _planned
    before, _planned = _planned, kind
    try:
        yield
    finally:
        _planned = before


def kind_of(device: torch.device) -> str:
    """``device.type``; on the meta device, the type of what it stands for."""
    return _planned if device.type == "meta" else device.type


def tile_elements(kind: str) -> int:
    """How much is worked on at a time by this kind of device (:func:`kind_of`): what a CPU's caches hold; on a GPU
    enough for its launches to cost little."""
    return min(TILE_ELEMENTS, CACHE_ELEMENTS * torch.get_num_threads()) if kind == "cpu" else TILE_ELEMENTS


@torch.no_grad()
def write_back(
    q: Tensor,
    scale: Tensor,
    update_rows: Callable[[int, int], Tensor],
    *,
    shrink: float,
    key: tuple[int, int],
    first_row: int = 0,
    rounding: str = "stochastic",
    scales: str = "sticky",
) -> None:
    """``W ← SR(W · (1 − shrink) + update)`` in place, in fp32, tile by tile, with one stochastic rounding at the end.

    ``q`` int8 (out, in) and ``scale`` bf16 (out, groups) are the weight; ``update_rows(a, b)`` gives rows a … b−1
    of the update, fp32 (b − a, in); ``shrink`` is lr · weight_decay; ``key`` selects the random bits, indexed by
    element of the whole tensor, in which ``q``'s first row has the number ``first_row``. The sum is formed as (integer,
    small change) wherever the scale stays, so that updates far below fp32's resolution at 127 still count.

    ``rounding``: one of ``ROUNDINGS``; ``scales``: one of ``SCALES``.
    """
    rows, width = q.shape
    kind = kind_of(q.device)
    # All tiles share these buffers. New ones for every tile would cost a CPU more time than the arithmetic.
    step = min(rows, max(1, tile_elements(kind) // width))
    shape = (step, scale.shape[1], width // scale.shape[1])
    first = ramp(step * width, q.device).view(shape)
    real = torch.empty_like(first, dtype=torch.float32)
    buffers = (
        first, real, torch.empty_like(real), torch.empty_like(real), torch.empty_like(first), torch.empty_like(first)
    )  # fmt: skip
    for a, b in write_back_tiles(q):
        update = update_rows(a, b).view(b - a, *shape[1:])
        for c in range(a, b, step):
            d = min(c + step, b)
            tile = buffers if d - c == step else tuple(buffer[: d - c] for buffer in buffers)
            # Bits are numbered by element of the whole tensor, so that tiles and shards round as one piece would.
            start = (first_row + c) * width
            target = q[c:d].view(tile[0].shape)
            draw = (key if rounding == "stochastic" else None, (first_row + c) * scale.shape[1])
            change = _prepare_tile(target, scale[c:d], update[c - a : d - a], tile, shrink, scales, draw, kind)
            numbers, base, _, work, bits, scratch = tile
            if rounding == "stochastic":
                fill_random_bits(key, start, numbers, bits, scratch)
                add_rounded_(base, change, bits, work)
            else:
                base.add_(torch.round(change, out=work))
            target.copy_(base.clamp_(-QMAX, QMAX))


def _prepare_tile(
    q: Tensor,
    scale: Tensor,
    update: Tensor,
    tile: tuple[Tensor, ...],
    shrink: float,
    scales: str,
    draw: tuple[tuple[int, int] | None, int],
    kind: str,
) -> Tensor:
    """For whole rows, (rows, groups, size): sets their new scales, the tile's integers, and returns the change that is
    to be added to these and rounded. ``draw``: ``key`` and ``start`` of :func:`_rederived_scale`; ``kind``: of the
    device."""
    _, base, change, work, _, scratch = tile
    # Everything is in units of the old scale, in which the stored weights are whole numbers and a change is small.
    old = scale.float()
    base.copy_(q)
    torch.div(update, old.unsqueeze(2), out=change)
    if shrink:
        change.sub_(torch.mul(base, shrink, out=work))
    values = torch.add(base, change, out=work)
    ends = None
    if scales == "rederived":
        new, ends = _rederived_scale(values, old, scratch.view(torch.float32), *draw)
    else:
        new = _sticky_scale(values, old, scratch.view(torch.float32))
    # Where the scale moves, old integers lie between the new grid's points. The whole value is then to be rounded,
    # which is said by an integer of 0 and a change of the value in new units.
    moved = new != old
    if kind == "cpu" and scales == "sticky":
        # Few groups move. A GPU would rather work on all than wait for the answer to which.
        if not q.is_meta and moved.any():
            change[moved] = values[moved] * (old / new)[moved].unsqueeze(1)
            base[moved] = 0.0
            scale.copy_(new)
    else:
        change = torch.where(moved.unsqueeze(2), values * (old / new).unsqueeze(2), change)
        base.masked_fill_(moved.unsqueeze(2), 0.0)
        scale.copy_(new)
    # Rounding to the nearest takes the ends there by itself, and says what it left out.
    if ends is not None and draw[0] is not None:
        change = torch.where(ends, torch.sign(values) * QMAX - base, change)
    return change
