"""AdamW with 4-bit moments, for any device."""

import math

import torch
from torch import Tensor

from ...errors import ConfigError
from ...quant import fourbit
from ...quant.int8 import kind_of, tile_elements
from .adam8bit import CodedAdamW, adamw


class AdamW4bit(CodedAdamW):
    """AdamW whose moments are kept in 4 bits (arXiv 2309.01507; see ``quant.fourbit``), for contiguous fp32 parameters.

    State of a matrix (n, m) of 4,096 values or more: ``step`` int; ``packed1`` uint8 (⌈nm/128⌉, 64) and ``absmax1``
    fp32 (⌈nm/128⌉,); ``packed2`` uint8 (n, ⌈m/2⌉), ``rows2`` fp32 (n,) and ``columns2`` (m,). More dimensions are taken
    as a matrix of their first one's rows. Smaller ones and vectors keep fp32 ``state1`` and ``state2``. Unlike in the
    paper, embeddings are coded too. A matrix that steps in parts has column maxima for each.

    Raises :class:`ConfigError` for other parameters and for values out of range.
    """

    names = ("packed1", "packed2")

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if parameter.dtype != torch.float32 or not parameter.is_contiguous():
                raise ConfigError(
                    f"AdamW4bit was given a {parameter.dtype} parameter of shape {tuple(parameter.shape)}, which must "
                    "be contiguous float32; use torch.optim.AdamW"
                )

    def coded(self, parameter: Tensor) -> bool:
        return parameter.ndim > 1 and super().coded(parameter)

    def new_state(self, parameter: Tensor) -> dict:
        rows, blocks = parameter.shape[0], -(-parameter.numel() // fourbit.BLOCK)
        columns, device = parameter.numel() // rows, parameter.device
        return {
            "step": 0,
            "packed1": torch.zeros(blocks, fourbit.BLOCK // 2, dtype=torch.uint8, device=device),
            "absmax1": torch.zeros(blocks, device=device),
            "packed2": torch.zeros(rows, (columns + 1) // 2, dtype=torch.uint8, device=device),
            "rows2": torch.zeros(rows, device=device),
            "columns2": torch.zeros(columns, device=device),
        }

    def step_coded(self, parameter: Tensor, gradient: Tensor, state: dict, group: dict) -> None:
        """Twice over the tiles, as a second moment's code needs the maxima of whole columns: they are found first."""
        value, slope = (tensor.view(tensor.shape[0], -1) for tensor in (parameter, gradient))
        rows, columns = torch.zeros_like(state["rows2"]), torch.zeros_like(state["columns2"])
        beta2 = group["betas"][1]
        tiles = _row_tiles(value)
        # The first pass finds the maxima of the new second moments, and keeps nothing else of them.
        for a, b in tiles:
            second = _second(state, a, b).mul_(beta2).addcmul_(slope[a:b], slope[a:b], value=1.0 - beta2)
            torch.amax(second, dim=1, out=rows[a:b])
            torch.maximum(columns, second.amax(dim=0), out=columns)
        # The second pass steps, and codes both moments. The old maxima are read until the last tile is done.
        for a, b in tiles:
            second, shape = _second(state, a, b), value[a:b].shape
            blocks = slice(a * shape[1] // fourbit.BLOCK, -(-b * shape[1] // fourbit.BLOCK))
            first = fourbit.decode_first(state["packed1"][blocks], state["absmax1"][blocks], shape)
            adamw(value[a:b], slope[a:b], first, second, torch.empty_like(first), state["step"], group)
            state["packed1"][blocks], state["absmax1"][blocks] = fourbit.encode_first(first)
            state["packed2"][a:b] = fourbit.encode_second(second, rows[a:b], columns)
        state["rows2"].copy_(rows)
        state["columns2"].copy_(columns)


def _second(state: dict, a: int, b: int) -> Tensor:
    return fourbit.decode_second(state["packed2"][a:b], state["rows2"][a:b], state["columns2"])


def _row_tiles(value: Tensor) -> list[tuple[int, int]]:
    """Row ranges of whole blocks of first moments; on the meta device, where only memory counts, two stand for all."""
    rows, width = value.shape
    unit = fourbit.BLOCK // math.gcd(fourbit.BLOCK, width)
    step = -(-max(1, tile_elements(kind_of(value.device)) // width) // unit) * unit
    tiles = [(start, min(start + step, rows)) for start in range(0, rows, step)]
    return tiles[:2] if value.is_meta else tiles
