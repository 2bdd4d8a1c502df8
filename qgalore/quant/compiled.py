"""The int8 grid's write-back for a CPU, made by PyTorch's own compiler (inductor, which calls a C++ compiler).

Two loops instead of some forty: the random bits and the sum stay in registers. It gives ``int8.write_back``'s results
in every bit. One piece of code is made for each group size, in seconds, and is kept on disk by PyTorch; learning rate,
key, first element and number of groups are its arguments.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from . import int8
from .counter import MAX_ELEMENTS, random_bits
from .int8 import HEADROOM, MAX_SCALE, MIN_SCALE, QMAX, row_tiles

_KEY = (0x1234567, -0x7654321)


def _mix(x: Tensor) -> Tensor:
    """``counter._mix_``: the shifts of int32 are arithmetic, so each is masked to a logical one."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * (0x846CA68B - (1 << 32))
    return x ^ ((x >> 16) & 0xFFFF)


def _bits(count: int, start: Tensor, key0: Tensor, key1: Tensor) -> Tensor:
    return _mix(_mix((torch.arange(count, dtype=torch.int32) + start) ^ key0) + key1)


def _rounded_to_bfloat16(x: Tensor) -> Tensor:
    """Positive finite fp32 rounded to nearest even bf16, in integers: the compiler may leave a cast there and back
    out."""
    raw = x.view(torch.int32)
    return ((raw + 0x7FFF + ((raw >> 16) & 1)) & -65536).view(torch.float32)


def _groups(
    q: Tensor, scale: Tensor, update: Tensor, shrink: Tensor, start: Tensor, key0: Tensor, key1: Tensor
) -> None:
    """``int8._write_tile`` on groups (n, size) with scales (n,), in the same order of fp32 operations."""
    old, base = scale.float(), q.float()
    change = update / old.unsqueeze(1) - base * shrink
    values = base + change
    peak = values.abs().amax(dim=1)
    fresh = _rounded_to_bfloat16((peak * old * (HEADROOM / QMAX)).clamp(MIN_SCALE, MAX_SCALE))
    new = torch.where((peak > QMAX) | (peak < QMAX // 2), fresh, old)
    moved = (new != old).unsqueeze(1)
    change = torch.where(moved, values * (old / new).unsqueeze(1), change)
    base = torch.where(moved, 0.0, base)
    mantissa = ((_bits(q.numel(), start, key0, key1).view(q.shape) >> 9) & 0x7FFFFF) | 0x3F800000
    whole = torch.floor(change)
    up = mantissa.view(torch.float32) - (1.0 - 2.0**-24) < change - whole
    q.copy_((base + whole + up.float()).clamp(-QMAX, QMAX))
    scale.copy_(new)


@cache
def _function() -> Callable[..., None]:
    return torch.compile(_groups, fullgraph=True)


def _int32(value: int) -> Tensor:
    return torch.tensor(value if value < 1 << 31 else value - (1 << 32), dtype=torch.int32)


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
    """See ``int8.write_back``. Raises ``ValueError`` past the end of the stream of random bits."""
    rows, width = q.shape
    if (end := (first_row + rows) * width) > MAX_ELEMENTS:
        raise ValueError(f"a stream of random bits has {MAX_ELEMENTS} elements; {end} were asked for")
    size = width // scale.shape[1]
    for a, b in row_tiles(rows, width):
        tile = (q[a:b].view(-1, size), scale[a:b].view(-1), update_rows(a, b).view(-1, size))
        for part in tile:
            torch._dynamo.maybe_mark_dynamic(part, 0)
        _function()(*tile, torch.tensor(shrink), _int32((first_row + a) * width), *map(_int32, key))


def failure() -> str | None:
    """Why the compiled code cannot be used on this machine, or None: it is made and compared with the reference."""
    generator = torch.Generator().manual_seed(0)
    weight, update = torch.randn(2, 37, 384, generator=generator)
    update *= random_bits(_KEY, 0, 37).remainder(5).view(37, 1) / 100.0  # rows that keep their scales, and that do not
    stored = int8.quantize(weight, 128)
    there = [part.clone() for part in stored]
    try:
        for grid, parts in ((write_back, there), (int8.write_back, stored)):
            grid(*parts, lambda a, b: update[a:b], shrink=0.01, key=_KEY, first_row=3)
    except Exception as error:  # no C++ compiler, or whatever it says
        lines = [line for line in str(error).splitlines() if line.strip()]
        return f"PyTorch's compiler fails on this CPU with {type(error).__name__}: {(lines or [''])[0][:200]}"
    if all(torch.equal(one, other) for one, other in zip(there, stored, strict=True)):
        return None
    return "what PyTorch's compiler makes of the int8 write-back differs from the reference on this CPU"
