"""Replacing a model's linear layers by :class:`LowRankLinear`."""

from collections import Counter
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from types import SimpleNamespace

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .. import combinations
from ..errors import ConfigError
from ..lowrank.layers import conv, experts
from ..lowrank.layers.embedding import LowRankEmbedding, TiedHead
from ..lowrank.layers.linear import LowRankLinear
from ..lowrank.layers.product_choice import Products
from ..lowrank.subspace.ranks import STEP
from ..lowrank.subspace.sides import PROJ_TYPES
from ..quant.basis import FORMATS
from ..quant.int8 import GROUP_SIZES, group_size_for
from ..quant.int8_products import obstacle
from .report import ConversionReport, ConvertedLayer

WEIGHT_FORMATS = ("int8", "none")
COMPUTE = ("bf16", "int8")
EMBEDDINGS = ("full", "int8")
CONVOLUTIONS = ("full", "tucker")


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _check_patterns(names: list[str], patterns: list[str], key: str) -> None:
    for pattern in patterns:
        if not _matches_any(names, pattern):
            raise ConfigError(
                f"{key} pattern {pattern!r} matches no linear layer; the layers are named like {', '.join(names[:3])}"
            )


def _matches_any(names: list[str], pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in names)


def _heads(model: nn.Module) -> dict[nn.Module, str]:
    """The linear layers that a task adds to the pretrained body, each with why it is left: a language model's output
    head, or everything beside the body of a classifier."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if output is not None:
        return {output: "the output head, trained in full"}
    prefix = getattr(model, "base_model_prefix", "")
    if not prefix or not isinstance(getattr(model, prefix, None), nn.Module):
        return {}
    beside = (m for n, m in model.named_modules() if not f"{n}.".startswith(f"{prefix}."))
    return dict.fromkeys(beside, "in the task's head, trained in full")


def _stacked(model: nn.Module, include: list[str], exclude: list[str], report: ConversionReport):
    """(name, module) of every experts module to convert; those that the patterns leave go to ``report.skipped``.

    Raises :class:`ConfigError` for other trainable tensors of more than two dimensions, which would silently train in
    full, and with them most of such a model.
    """
    for name, module in list(model.named_modules()):
        own = {key: p for key, p in module.named_parameters(recurse=False) if p.ndim > 2 and min(p.shape) > 1}
        if isinstance(module, nn.modules.conv._ConvNd) or not any(p.requires_grad for p in own.values()):
            continue
        if why := experts.problem(module):
            raise ConfigError(
                f"{name} keeps {sum(p.numel() for p in own.values()):,} values in {len(own)} tensors of more than two "
                f"dimensions, for example {next(iter(own))}, and {why}: they would be trained in full, with Adam's "
                "moments beside them. Take another model, or freeze them first with requires_grad_(False)"
            )
        if include and not _matches(name, include):
            report.skipped[name] = "not in include"
        elif _matches(name, exclude):
            report.skipped[name] = "in exclude"
        else:
            yield name, module


def _convert_experts(name: str, module: nn.Module, **options) -> tuple[experts.Experts, list[ConvertedLayer]]:
    """The replacement for one experts module, a :class:`LowRankLinear` for each matrix, and their lines. ``module``
    loses its weights to it, one tensor at a time."""
    made: dict[str, list[nn.Module]] = {}
    lines = []
    for key in experts.NAMES:
        stacked = module._parameters.pop(key).detach()
        made[key] = []
        for number, weight in enumerate(stacked):
            part = SimpleNamespace(weight=weight.clone())  # of its own: a view would keep the whole
            layer, line = _replacement(f"{name}.{key}.{number}", part, **options)
            made[key].append(layer.train(module.training))
            lines.append(line)
    return experts.Experts(module, **made).train(module.training), lines


def _candidates(model: nn.Module, include: list[str], exclude: list[str], report: ConversionReport):
    """(name, module) of every linear layer to convert; the others go to ``report.skipped`` with the reason."""
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))]
    names = [name for name, _ in layers]
    names += [n for n, m in model.named_modules() if experts.problem(m) is None or conv.problem(m) is None]
    _check_patterns(names, include, "include")
    _check_patterns(names, exclude, "exclude")
    users = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    heads = _heads(model)
    for name, module in layers:
        if module in heads and not _matches(name, include):
            report.skipped[name] = heads[module]
        elif include and not _matches(name, include):
            report.skipped[name] = "not in include"
        elif _matches(name, exclude):
            report.skipped[name] = "in exclude"
        elif users[id(module.weight)] > 1:
            report.skipped[name] = "its weight is shared with another module"
        elif not module.weight.requires_grad:
            report.skipped[name] = "its weight is frozen"
        elif type(module) not in (nn.Linear, Conv1D):
            report.skipped[name] = f"a {type(module).__name__}, whose forward may differ from nn.Linear's"
        else:
            yield name, module


def _replacement(
    name,
    module,
    *,
    rank,
    proj_type,
    weight_format,
    group_size,
    basis_format,
    grad_dtype,
    ranks=None,
    kind=LowRankLinear,
):
    """The :class:`LowRankLinear` (or other ``kind``) for one layer and its line in the report."""
    transposed = isinstance(module, Conv1D)
    weight = module.weight.detach()
    weight = weight.T.contiguous() if transposed else weight
    notes = []
    in_force, most = rank, None
    if rank == "auto":
        in_force, most = ranks.within(min(weight.shape))
        notes += [] if ranks.most else ["max_rank is not given: the rank's limit is a quarter of the smaller side"]
    elif rank is not None and rank > min(weight.shape):
        in_force = min(weight.shape)
        notes.append(f"rank {rank} is above the matrix's smaller side; clamped to {in_force}")
    size = None
    if weight_format == "int8":
        size = group_size_for(weight.shape[1], group_size)
        if size != group_size and group_size != "row":
            notes.append(f"group_size {group_size} does not divide in_features {weight.shape[1]}; {size} is used")
    try:
        layer = kind(
            weight,
            getattr(module, "bias", None),
            rank=in_force,
            proj_type=proj_type,
            basis_format=basis_format,
            group_size=size,
            grad_dtype=grad_dtype,
            transposed=transposed,
            max_rank=most,
        )
    except ValueError as error:
        raise ConfigError(f"{name} cannot be converted: {error}") from error
    side = {(1, 0): "left", (0, 1): "right", (1, 1): "both", (0, 0): "none"}[
        (int(layer.left is not None), int(layer.right is not None))
    ]
    return layer, ConvertedLayer(name, tuple(weight.shape), in_force, size, side, tuple(notes), most)


def _convert_convolutions(model: nn.Module, include, exclude, report: ConversionReport, **options) -> None:
    """Replace the convolutions that the patterns leave; the others go to ``report.skipped``."""
    for name, module in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.modules.conv._ConvNd)]:
        why = "not in include" if include and not _matches(name, include) else conv.problem(module)
        if why := "in exclude" if _matches(name, exclude) else why:
            report.skipped[name] = why
            continue
        layer = conv.LowRankConv(module, **options)
        sides = [part for part, basis in (("out", layer.left), ("in", layer.right)) if basis is not None]
        side = {2: "both", 0: "none"}.get(len(sides), "left" if sides == ["out"] else "right")
        line = ConvertedLayer(name, tuple(layer.weight.shape), options["rank"], None, side, tuple(layer.notes))
        report.converted.append(line)
        model.set_submodule(name, layer.train(module.training))


def _plain_embedding(name: str, embedding: nn.Module | None, model: nn.Module, users: int) -> nn.Embedding:
    """``embedding``, if it does what :class:`LowRankEmbedding` does. Raises :class:`ConfigError` otherwise."""
    problem = None
    if type(embedding) is not nn.Embedding:
        problem = f"it is a {type(embedding).__name__}, whose forward may differ from nn.Embedding's"
    elif embedding.max_norm is not None or embedding.scale_grad_by_freq or embedding.sparse:
        problem = "it uses max_norm, scale_grad_by_freq or sparse gradients"
    elif sum(embedding.weight is p for m in model.modules() for p in m.parameters(recurse=False)) > users:
        problem = "its weight is shared with a module other than the output head"
    if problem:
        raise ConfigError(f"embeddings is 'int8', but {name or 'the input embedding'}: {problem}; set embeddings=full")
    return embedding


def _convert_embeddings(model: nn.Module, report: ConversionReport, exclude: list[str], **options) -> None:
    """Replace the input embedding, and the head: by one that shares it if they are tied. What is frozen, and an untied
    head that is in ``exclude`` or converted already, stays."""
    if not (hasattr(model, "get_input_embeddings") and hasattr(model, "get_output_embeddings")):
        raise ConfigError(
            f"embeddings is 'int8', and {type(model).__name__} does not say which its embeddings are, as models of "
            "transformers do with get_input_embeddings; set embeddings=full"
        )
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    name, head_name = (next((n for n, m in model.named_modules() if m is module), None) for module in modules)
    embedding, head = modules
    tied = head is not None and head.weight is getattr(embedding, "weight", None)
    _plain_embedding(name, embedding, model, 1 + tied)
    if head_name is not None and type(head) not in (nn.Linear, LowRankLinear):
        raise ConfigError(f"embeddings is 'int8', but {head_name} is a {type(head).__name__}; set embeddings=full")
    if tied and head_name is not None and _matches(head_name, exclude):
        raise ConfigError(
            f"exclude names {head_name}, which is tied to {name}: set embeddings=full or drop the pattern"
        )
    replacements: list[tuple[str, nn.Module]] = []
    if embedding.weight.requires_grad:
        kind = partial(LowRankEmbedding, padding_idx=embedding.padding_idx)
        layer, line = _replacement(name, embedding, kind=kind, **options)
        replacements.append((name, layer))
        if tied:
            replacements.append((head_name, TiedHead(layer, head.bias)))
            line = replace(line, notes=(*line.notes, f"{head_name} is the same tensor, trained by both gradients"))
        report.converted.append(line)
    else:
        report.skipped[name] = "its weight is frozen"
    if type(head) is nn.Linear and not tied and head.weight.requires_grad and not _matches(head_name, exclude):
        layer, line = _replacement(head_name, head, **options)
        replacements.append((head_name, layer))
        report.converted.append(line)
    for place, module in replacements:
        module.train(model.get_submodule(place).training)
        model.set_submodule(place, module)
        report.skipped.pop(place, None)


def _with_integer_products(layer: LowRankLinear, line: ConvertedLayer) -> ConvertedLayer:
    """Let ``layer`` multiply integers, if its shape can; its line in the report says where it cannot."""
    why = obstacle(*line.shape)
    if why is None:
        layer.products = Products(line.name)
        return line
    return replace(line, notes=(*line.notes, f"{line.shape[0]} × {line.shape[1]} stays in floating point: {why}"))


def _refuse(message: str | None) -> None:
    if message is not None:
        raise ConfigError(message)


@dataclass(frozen=True)
class _Ranks:
    """``max_rank`` and ``mean_rank`` of ``rank="auto"``, as given."""

    most: int | None
    mean: int | None

    def within(self, side: int) -> tuple[int, int]:
        """(mean, max) of a layer whose smaller side is ``side``."""
        most = min(side, self.most or max(STEP, self.mean or 0, side // 4 // STEP * STEP))
        return min(most, self.mean or most), most

    def check(self, rank: int | str | None, proj_type: str) -> None:
        """Raise :class:`ConfigError` for values that cannot work."""
        for key, value in (("max_rank", self.most), ("mean_rank", self.mean)):
            if value is not None and rank != "auto":
                raise ConfigError(f"{key} is {value!r}, and rank is {rank!r}; it goes with rank 'auto' only")
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < STEP):
                raise ConfigError(f"{key} is {value!r}; ranks move by {STEP}: give at least {STEP}, or a rank")
        _refuse(combinations.ordered_ranks(combinations.ARGUMENTS, rank, self.mean, self.most))
        _refuse(combinations.automatic_side(combinations.ARGUMENTS, rank, proj_type))


def _check_options(rank: int | str | None, given: dict[str, int | str]) -> None:
    """Raise :class:`ConfigError` for a value that :func:`convert` does not know, or two that do not go together."""
    allowed = {"proj_type": PROJ_TYPES, "weight_format": WEIGHT_FORMATS, "basis_format": FORMATS}
    allowed |= {"group_size": (*GROUP_SIZES, "row"), "embeddings": EMBEDDINGS, "compute": COMPUTE}
    allowed |= {"convolutions": CONVOLUTIONS}
    for key, value in given.items():
        if value not in allowed[key]:
            raise ConfigError(f"{key} is {value!r}; it must be one of {', '.join(map(str, allowed[key]))}")
    chosen = (given[name] for name in ("compute", "weight_format", "group_size"))
    _refuse(combinations.integer_products(combinations.ARGUMENTS, *chosen))
    if rank not in (None, "auto") and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ConfigError(f"rank is {rank!r}; it must be a whole number of at least 1, 'auto', or None for full rank")


def _refuse_a_layer(model: nn.Module) -> None:
    """Raise :class:`ConfigError` where ``model`` is itself a layer: it cannot replace itself."""
    layer = isinstance(model, nn.Linear | Conv1D | nn.modules.conv._ConvNd | LowRankLinear)
    if layer or experts.problem(model) is None:
        raise ConfigError(
            f"the model given to convert is itself a layer, a {type(model).__name__}. A layer is replaced inside a "
            "module that holds it: wrap it, for example in torch.nn.Sequential(layer)"
        )


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
    every module of a mixture's experts by one with such a layer for each matrix (see ``lowrank.layers.experts``). The
    head is a language model's output layer, or what a classifier has beside the pretrained body.

    rank: of the projection, clamped to a matrix's smaller side (reported); None trains Δ at full rank, unprojected;
    ``auto``: each layer's own, found at refreshes (``subspace.ranks``), up to ``max_rank`` (None: a quarter of the
    smaller side), all layers together within the memory of a uniform ``mean_rank`` (None: no less than their maxima).
    weight_format: ``int8`` or ``none`` (keep the dtype); group_size: 128, 64, 32 or ``row``, along in_features, with a
    reported fallback where it does not divide. basis_format: ``int4``, ``nf4``, ``bf16`` or ``fp32``.
    include / exclude: ``fnmatch`` patterns on full module names (``*.q_proj``, ``*.experts``); include names may name
    the head too.
    embeddings: ``full`` (dense), or ``int8``: the input embedding and the head become low-rank too, in int8 whatever
    ``weight_format`` is; where the two are tied they stay one tensor.
    compute: ``bf16``, products in the activations' dtype with the weight dequantized, or ``int8``: with its integers,
    except in the head (see ``quant.int8_products``). That needs int8 weights with group_size ``row``.
    convolutions: ``full`` (dense), or ``tucker``: kernels keep their dtype, and their gradients are projected on both
    channel dimensions to at most ``rank`` (see ``lowrank.layers.conv``).

    Raises :class:`ConfigError` for bad values, a pattern without a match, weights that are not finite, a model with
    other stacked 3-D tensors than such experts', and one in which no layer is left to convert.
    """
    given = {"proj_type": proj_type, "weight_format": weight_format, "basis_format": basis_format}
    chosen = {"group_size": group_size, "embeddings": embeddings, "compute": compute, "convolutions": convolutions}
    _check_options(rank, {**given, **chosen})
    _refuse_a_layer(model)
    ranks = _Ranks(max_rank, mean_rank)
    ranks.check(rank, proj_type)
    if rank == "auto" and convolutions == "tucker":
        raise ConfigError("rank is 'auto': the projected sides of a convolution have a fixed one; give a number")
    report, heads = ConversionReport(), _heads(model)
    options = {**given, "rank": rank, "ranks": ranks, "group_size": group_size, "grad_dtype": grad_dtype}
    patterns = (include or [], exclude or [])
    stacked = list(_stacked(model, *patterns, report))
    for name, module in list(_candidates(model, *patterns, report)):
        layer, line = _replacement(name, module, **options)
        layer.train(module.training)
        model.set_submodule(name, layer)
        if compute == "int8" and module not in heads:
            line = _with_integer_products(layer, line)
        report.converted.append(line)
    for name, module in stacked:
        layer, lines = _convert_experts(name, module, **options)
        if compute == "int8":
            lines = [replace(line, notes=(*line.notes, "experts multiply in floating point")) for line in lines]
        model.set_submodule(name, layer)
        report.converted += lines
    if embeddings == "int8":
        _convert_embeddings(model, report, exclude or [], **{**options, "weight_format": "int8"})
    if convolutions == "tucker":
        _convert_convolutions(model, *patterns, report, rank=rank, basis_format=basis_format, grad_dtype=grad_dtype)
    if not report.converted:
        reasons = "; ".join(f"{n}: {why}" for n, why in list(report.skipped.items())[:3]) or "it has no linear layer"
        raise ConfigError(f"no layer of {type(model).__name__} was converted ({reasons}); check include and exclude")
    leaves = {id(p) for m in model.modules() if isinstance(m, LowRankLinear) for p in (m.delta, m.probe)}
    report.dense = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad and id(p) not in leaves}
    return report
