"""Low-rank layers in the place of a model's own, one at a time, and what the report says of each."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import ConfigError
from ..lowrank.layers import experts
from ..lowrank.layers.conv import LowRankConv
from ..lowrank.layers.linear import LowRankLinear
from ..lowrank.layers.product_choice import Products
from ..quant.int8 import group_size_for
from ..quant.int8_products import obstacle
from .conversion_options import LayerOptions
from .report import ConvertedLayer


def _rank_in_force(options: LayerOptions, side: int) -> tuple[int | None, int | None, list[str]]:
    """(rank, limit of an automatic rank, notes) of a layer whose smaller side is ``side``."""
    if options.rank == "auto":
        mean, most = options.automatic_ranks(side)
        note = "max_rank is not given: the rank's limit is a quarter of the smaller side"
        return mean, most, [] if options.max_rank else [note]
    if options.rank is not None and options.rank > side:
        return side, None, [f"rank {options.rank} is above the matrix's smaller side; clamped to {side}"]
    return options.rank, None, []


def _group_in_force(options: LayerOptions, in_features: int) -> tuple[int | None, list[str]]:
    """(group size, notes); no size where the weight keeps its dtype."""
    if options.weight_format != "int8":
        return None, []
    asked = options.group_size
    size = group_size_for(in_features, asked)
    if size == asked or asked == "row":
        return size, []
    return size, [f"group_size {asked} does not divide in_features {in_features}; {size} is used"]


def _sides(layer: LowRankLinear) -> str:
    has_left, has_right = layer.left is not None, layer.right is not None
    if has_left and has_right:
        return "both"
    return "left" if has_left else "right" if has_right else "none"


def replacement(
    name: str, module: Any, options: LayerOptions, kind: Callable[..., LowRankLinear] = LowRankLinear
) -> tuple[LowRankLinear, ConvertedLayer]:
    """The :class:`LowRankLinear` (or other ``kind``) for one layer and its line in the report. ``module`` has a
    ``weight``, and perhaps a ``bias``."""
    transposed = isinstance(module, Conv1D)
    weight = module.weight.detach()
    weight = weight.T.contiguous() if transposed else weight
    rank, most, rank_notes = _rank_in_force(options, min(weight.shape))
    size, size_notes = _group_in_force(options, weight.shape[1])
    try:
        layer = kind(
            weight,
            getattr(module, "bias", None),
            rank=rank,
            proj_type=options.proj_type,
            basis_format=options.basis_format,
            group_size=size,
            grad_dtype=options.grad_dtype,
            transposed=transposed,
            max_rank=most,
        )
    except ValueError as error:
        raise ConfigError(f"{name} cannot be converted: {error}") from error
    notes = (*rank_notes, *size_notes)
    return layer, ConvertedLayer(name, tuple(weight.shape), rank, size, _sides(layer), notes, most)


def expert_replacements(
    name: str, module: nn.Module, options: LayerOptions
) -> tuple[experts.Experts, list[ConvertedLayer]]:
    """The replacement for one experts module, a :class:`LowRankLinear` for each matrix, and their lines. ``module``
    loses its weights to it, one tensor at a time."""
    made: dict[str, list[nn.Module]] = {}
    lines = []
    for key in experts.NAMES:
        stacked = module._parameters.pop(key).detach()
        made[key] = []
        for number, weight in enumerate(stacked):
            # A copy, because a view would keep the whole stack in memory.
            part = SimpleNamespace(weight=weight.clone())
            layer, line = replacement(f"{name}.{key}.{number}", part, options)
            made[key].append(layer.train(module.training))
            lines.append(line)
    return experts.Experts(module, **made).train(module.training), lines


def convolution_replacement(name: str, module: Any, options: LayerOptions) -> tuple[LowRankConv, ConvertedLayer]:
    """The replacement for one convolution and its line in the report. Its kernel keeps its dtype."""
    layer = LowRankConv(module, rank=options.rank, basis_format=options.basis_format, grad_dtype=options.grad_dtype)
    shape = tuple(layer.weight.shape)
    return layer, ConvertedLayer(name, shape, options.rank, None, _sides(layer), tuple(layer.notes))


def with_integer_products(layer: LowRankLinear, line: ConvertedLayer) -> ConvertedLayer:
    """Let ``layer`` multiply integers, if its shape can; its line in the report says where it cannot."""
    why = obstacle(*line.shape)
    if why is None:
        layer.products = Products(line.name)
        return line
    return replace(line, notes=(*line.notes, f"{line.shape[0]} × {line.shape[1]} stays in floating point: {why}"))
