"""The input embedding and the output head as low-rank layers in int8."""

from dataclasses import dataclass, replace
from functools import partial

from torch import nn

from ..errors import ConfigError
from ..lowrank.layers.embedding import LowRankEmbedding, TiedHead
from ..lowrank.layers.linear import LowRankLinear
from .conversion_options import LayerOptions, matches
from .replacement import replacement
from .report import ConversionReport


@dataclass(frozen=True)
class _Ends:
    """Where tokens enter and leave a model. ``head`` is None in a model without one."""

    name: str
    embedding: nn.Embedding
    head_name: str | None
    head: nn.Module | None
    tied: bool


def _problem_of(embedding: nn.Module | None, model: nn.Module, users: int) -> str | None:
    """What keeps ``embedding`` from being replaced, if ``users`` modules may have its weight."""
    if type(embedding) is not nn.Embedding:
        return f"it is a {type(embedding).__name__}, whose forward may differ from nn.Embedding's"
    if embedding.max_norm is not None or embedding.scale_grad_by_freq or embedding.sparse:
        return "it uses max_norm, scale_grad_by_freq or sparse gradients"
    if sum(embedding.weight is p for m in model.modules() for p in m.parameters(recurse=False)) > users:
        return "its weight is shared with a module other than the output head"
    return None


def _ends_of(model: nn.Module, exclude: tuple[str, ...]) -> _Ends:
    """Raises :class:`ConfigError` where a low-rank embedding would not do what the model's own does."""
    if not (hasattr(model, "get_input_embeddings") and hasattr(model, "get_output_embeddings")):
        raise ConfigError(
            f"embeddings is 'int8', and {type(model).__name__} does not say which its embeddings are, as models of "
            "transformers do with get_input_embeddings; set embeddings=full"
        )
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    name, head_name = (next((n for n, m in model.named_modules() if m is end), None) for end in (embedding, head))
    tied = head is not None and head.weight is getattr(embedding, "weight", None)
    if problem := _problem_of(embedding, model, 1 + tied):
        raise ConfigError(f"embeddings is 'int8', but {name or 'the input embedding'}: {problem}; set embeddings=full")
    if head_name is not None and type(head) not in (nn.Linear, LowRankLinear):
        raise ConfigError(f"embeddings is 'int8', but {head_name} is a {type(head).__name__}; set embeddings=full")
    if tied and head_name is not None and matches(head_name, exclude):
        raise ConfigError(
            f"exclude names {head_name}, which is tied to {name}: set embeddings=full or drop the pattern"
        )
    return _Ends(name, embedding, head_name, head, tied)


def convert_embeddings(
    model: nn.Module, report: ConversionReport, exclude: tuple[str, ...], options: LayerOptions
) -> None:
    """Replace the input embedding, and the head: by one that shares it if they are tied. What is frozen, and an untied
    head that is in ``exclude`` or converted already, stays. Raises :class:`ConfigError`."""
    ends = _ends_of(model, exclude)
    options = replace(options, weight_format="int8")
    replacements: list[tuple[str, nn.Module]] = []
    if ends.embedding.weight.requires_grad:
        kind = partial(LowRankEmbedding, padding_idx=ends.embedding.padding_idx)
        layer, line = replacement(ends.name, ends.embedding, options, kind)
        replacements.append((ends.name, layer))
        if ends.tied:
            replacements.append((ends.head_name, TiedHead(layer, ends.head.bias)))
            note = f"{ends.head_name} is the same tensor, trained by both gradients"
            line = replace(line, notes=(*line.notes, note))
        report.converted.append(line)
    else:
        report.skipped[ends.name] = "its weight is frozen"
    own_head = type(ends.head) is nn.Linear and not ends.tied and ends.head.weight.requires_grad
    if own_head and not matches(ends.head_name, exclude):
        layer, line = replacement(ends.head_name, ends.head, options)
        replacements.append((ends.head_name, layer))
        report.converted.append(line)
    for place, module in replacements:
        module.train(model.get_submodule(place).training)
        model.set_submodule(place, module)
        report.skipped.pop(place, None)
