"""How a model attends: to each document of a packed row causally and apart, or in one of transformers' ways.

A packed row holds several documents, and a token sees only those before it in its own. transformers' way is a mask of
tokens × tokens: kernels then compute the whole square, half of which a causal call never touches, and each layer keeps
the mask in the dtype of its queries. A causal call for each document computes the documents' own squares alone.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..data.documents import Documents
from ..replacing import replaced

BY_DOCUMENT = "qgalore_by_document"
FLEX = "flex_attention"


def by_document(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """Attention for transformers' registry: (rows, heads, tokens, size) each → (rows, tokens, heads, size).

    With :class:`Documents` in the place of the mask it is a causal call for all documents of a length, or one call if
    every row is a single document. Anything else is transformers' own ``sdpa``.
    """
    if not isinstance(attention_mask, Documents):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if options.get("position_bias") is not None:
        raise NotImplementedError("a bias of positions goes over a whole row, not over its documents")
    if attention_mask.whole:
        return sdpa_attention_forward(module, query, key, value, None, **options)
    rows, heads, tokens, _ = query.shape
    parts = list(zip(*(_apart(values, attention_mask) for values in (query, key, value)), strict=True))
    alike: dict[int, list[int]] = {}
    for number, part in enumerate(parts):
        alike.setdefault(part[0].shape[1], []).append(number)
    made: dict[int, Tensor] = {}
    for numbers in alike.values():
        together = (_stacked(values) for values in zip(*(parts[number] for number in numbers), strict=True))
        output, _ = sdpa_attention_forward(module, *together, None, **options)
        made |= zip(numbers, output.unbind(), strict=True)
    return torch.cat([made[number] for number in range(len(parts))]).view(rows, tokens, heads, -1), None


def _apart(values: Tensor, documents: Documents) -> list[Tensor]:
    """Those of each document, (heads, tokens, size). Slices would each hand back a gradient as large as all rows; these
    parts hand back one together."""
    rows = zip(values.unbind(), documents.lengths, strict=True)
    return [part for row, lengths in rows for part in row.split(lengths, dim=1)]


def _stacked(values: Sequence[Tensor]) -> Tensor:
    return values[0].unsqueeze(0) if len(values) == 1 else torch.stack(list(values))


AttentionInterface.register(BY_DOCUMENT, by_document)
AttentionMaskInterface.register(BY_DOCUMENT, sdpa_mask)  # for whoever calls the model without documents


def implementation(model: nn.Module) -> str:
    """The name of the attention that ``model`` uses, in transformers' registry."""
    return model.config.get_text_config()._attn_implementation


def takes_documents(model: nn.Module) -> bool:
    """Whether ``model``'s attention reads :class:`Documents`."""
    return implementation(model) in (BY_DOCUMENT, FLEX)


def use_by_document(model: nn.Module, sequence_length: int) -> str | None:
    """Let ``model``, on the meta device, attend document by document if it can in rows of ``sequence_length`` tokens.
    Otherwise it stays as it is, and the reason is returned."""
    before = implementation(model)
    if before != "sdpa":
        return f"{type(model).__name__} attends by {before}"
    if (reason := _other_layers(model, sequence_length) or use(model, BY_DOCUMENT)) is not None:
        return reason
    reason = _lost(model)
    if reason is not None:
        use(model, before)
    return reason


def use(model: nn.Module, name: str) -> str | None:
    """Let ``model`` attend by what transformers' registry calls ``name``. If it cannot, the reason is returned."""
    if implementation(model) == name:
        return None
    if not model._can_set_attn_implementation():
        return f"{type(model).__name__} has an attention of its own"
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return None


def _other_layers(model: nn.Module, sequence_length: int) -> str | None:
    """What layers, or a loss of theirs, look at beside the tokens before them in their document; None if nothing."""
    config = model.config.get_text_config()
    if getattr(config, "output_router_logits", False):
        return "the routers' load-balancing loss reads the mask (output_router_logits)"
    kinds = set(getattr(config, "layer_types", None) or ())
    if other := sorted(kinds - {"full_attention", "sliding_attention"}):
        return f"it has layers of kind {other[0]}"
    window = getattr(config, "sliding_window", None)
    slides = not kinds or "sliding_attention" in kinds
    if slides and window is not None and window < sequence_length:
        return f"layers see {window} tokens back, fewer than the {sequence_length} of a row"
    return None


@torch.no_grad()
def _lost(model: nn.Module) -> str | None:
    """Where documents do not arrive in every layer of ``model``, which is on the meta device; None if they do. Tried
    with one row of two documents."""
    lengths, seen = (3, 5), []

    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        seen.append(query.shape[-2])
        return query.new_empty((*query.shape[:-1], value.shape[-1]))

    ids = torch.zeros(1, sum(lengths), dtype=torch.int64, device="meta")
    inputs = {"input_ids": ids, "position_ids": ids, "attention_mask": Documents([lengths]), "use_cache": False}
    with replaced([(nn.functional, "scaled_dot_product_attention", attention)]):
        try:
            model(**inputs)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError) as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            return f"its layers want a mask ({type(error).__name__}: {reason})"
    if not seen or seen != list(lengths) * (len(seen) // 2):
        return "not all of its layers are told of documents"
    return None
