"""Replacing a model's linear layers by :class:`LowRankLinear`."""

from dataclasses import replace

import torch
from torch import nn

from ..errors import ConfigError
from ..lowrank.layers.linear import LowRankLinear
from . import conversion_options, selection
from .conversion_options import LayerOptions, Patterns
from .convert_embeddings import convert_embeddings
from .replacement import convolution_replacement, expert_replacements, replacement, with_integer_products
from .report import ConversionReport


def convert(
    model: nn.Module,
    *,
    rank: int | str | None,
    max_rank: int | None = None,
    mean_rank: int | None = None,
    proj_type: str = "std",
    weight_format: str = "int8",
    group_size: int | str = 128,
    basis_format: str = "int4",
    grad_dtype: torch.dtype = torch.float32,
    include: list[str] | None = None,
    exclude: list[str] | None = None,
    embeddings: str = "full",
    compute: str = "bf16",
    convolutions: str = "full",
) -> ConversionReport:
    """Replace, in place, every ``nn.Linear`` (and ``Conv1D``) of ``model`` except its head by a low-rank layer, and
    every module of a mixture's experts by one with such a layer for each matrix. The head is a language model's output
    layer, or what a classifier has beside the pretrained body.

    rank: of the projection, clamped to a matrix's smaller side (reported); None trains Δ at full rank, unprojected;
    ``auto``: each layer's own, found at refreshes, up to ``max_rank`` (None: a quarter of the smaller side), all layers
    together within the memory of a uniform ``mean_rank`` (None: no less than their maxima). weight_format: ``int8`` or
    ``none`` (keep the dtype); group_size: 128, 64, 32 or ``row``, along in_features, with a reported fallback where it
    does not divide. basis_format: ``int4``, ``nf4``, ``bf16`` or ``fp32``. include / exclude: ``fnmatch`` patterns on
    full module names (``*.q_proj``, ``*.experts``); include may name the head too. embeddings: ``full`` (dense), or
    ``int8``: the input embedding and the head become low-rank too, in int8 whatever ``weight_format`` is; tied ones
    stay one tensor. compute: ``bf16``, products in the activations' dtype with the weight dequantized, or ``int8``:
    with its integers, except in the head. That needs int8 weights with group_size ``row``. convolutions: ``full``
    (dense), or ``tucker``: kernels keep their dtype, and their gradients are projected on both channel dimensions to at
    most ``rank``.

    Raises :class:`ConfigError` for bad values, a pattern without a match, weights that are not finite, a model with
    other stacked 3-D tensors than such experts', and one in which no layer is left to convert.
    """
    options = LayerOptions(rank, max_rank, mean_rank, proj_type, weight_format, group_size, basis_format, grad_dtype)
    conversion_options.check(options, embeddings=embeddings, compute=compute, convolutions=convolutions)
    selection.refuse_a_layer(model)
    patterns = Patterns(tuple(include or ()), tuple(exclude or ()))
    report = ConversionReport()
    _convert_matrices(model, patterns, report, options, integers=compute == "int8")
    if embeddings == "int8":
        convert_embeddings(model, report, patterns.exclude, options)
    if convolutions == "tucker":
        _convert_convolutions(model, patterns, report, options)
    if not report.converted:
        reasons = "; ".join(f"{n}: {why}" for n, why in list(report.skipped.items())[:3]) or "it has no linear layer"
        raise ConfigError(f"no layer of {type(model).__name__} was converted ({reasons}); check include and exclude")
    leaves = {id(p) for m in model.modules() if isinstance(m, LowRankLinear) for p in (m.delta, m.probe)}
    report.dense = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad and id(p) not in leaves}
    return report


def _convert_matrices(
    model: nn.Module, patterns: Patterns, report: ConversionReport, options: LayerOptions, integers: bool
) -> None:
    """Replace linear layers and experts. ``integers``: whether layers other than the head multiply integers."""
    heads = selection.heads(model)
    # Listed before the linear layers are replaced, which are then no longer what this looks for.
    stacked = list(selection.stacked_experts(model, patterns, report.skipped))
    for name, module in list(selection.linear_layers(model, patterns, report.skipped)):
        layer, line = replacement(name, module, options)
        layer.train(module.training)
        model.set_submodule(name, layer)
        if integers and module not in heads:
            line = with_integer_products(layer, line)
        report.converted.append(line)
    for name, module in stacked:
        layer, lines = expert_replacements(name, module, options)
        if integers:
            lines = [replace(line, notes=(*line.notes, "experts multiply in floating point")) for line in lines]
        model.set_submodule(name, layer)
        report.converted += lines


def _convert_convolutions(
    model: nn.Module, patterns: Patterns, report: ConversionReport, options: LayerOptions
) -> None:
    for name, module in list(selection.convolutions(model, patterns, report.skipped)):
        layer, line = convolution_replacement(name, module, options)
        report.converted.append(line)
        model.set_submodule(name, layer.train(module.training))
