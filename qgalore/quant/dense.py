"""Write-back for weights kept in floating point, with the same shape of interface as the int8 grid's."""

from collections.abc import Callable

import torch
from torch import Tensor

from .counter import random_bits
from .int8 import write_back_tiles
from .rounding import to_bfloat16_stochastic


@torch.no_grad()
def write_back(
    weight: Tensor,
    update_rows: Callable[[int, int], Tensor],
    *,
    shrink: float,
    key: tuple[int, int],
    first_row: int = 0,
) -> None:
    """``W ← W · (1 − shrink) + update`` in place; bf16 weights are rounded stochastically, once.

    ``weight`` (rows, width) fp32 or bf16; ``update_rows(a, b)`` gives fp32 rows a … b−1; see ``int8.write_back``.
    """
    width = weight.shape[1]
    for a, b in write_back_tiles(weight):
        update = update_rows(a, b)
        if weight.dtype == torch.float32:
            (weight[a:b].mul_(1.0 - shrink) if shrink else weight[a:b]).add_(update)
            continue
        tile = weight[a:b].float() * (1.0 - shrink) + update
        if weight.dtype == torch.bfloat16:
            bits = random_bits(key, (first_row + a) * width, (b - a) * width, weight.device).view(tile.shape)
            tile = to_bfloat16_stochastic(tile, bits)
        weight[a:b] = tile
