"""Sequence classification and regression: the model, its loss, and what it gets right."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PretrainedConfig

from ..errors import ConfigError, counted
from ..evaluation import metrics
from ..evaluation.loss import Losses, one_by_one
from . import streaming
from .folder import load_buffers, stored
from .growing import extended
from .loading import as_stored
from .shapes import stored_config, stored_fields
from .weights import stored_tensors

AUTO = AutoModelForSequenceClassification


def configure(config: PretrainedConfig, names: tuple[str, ...] | None, pad_id: int | None) -> None:
    """Give ``config``, in place, its labels (``names``, or None for one number) and the padding token of the data:
    decoders look for the last token that is not padding."""
    config.id2label = {0: "value"} if names is None else dict(enumerate(names))
    config.label2id = {name: number for number, name in config.id2label.items()}
    config.problem_type = "regression" if names is None else "single_label_classification"
    if pad_id is not None:
        config.pad_token_id = pad_id
        config.get_text_config().pad_token_id = pad_id


def head_names(model: nn.Module) -> set[str]:
    """Parameters beside the pretrained body."""
    prefix = f"{model.base_model_prefix}."
    return {name for name, _ in model.named_parameters() if not name.startswith(prefix)}


def check_folder(folder: Path) -> None:
    """Raise :class:`ConfigError` for a folder whose description or files :func:`stored_source` cannot use."""
    stored_config(folder)
    stored_tensors(folder, stored_fields(folder))


def stored_source(folder: Path, model: nn.Module, *, seed: int, report: Callable[[str], None]) -> streaming.Source:
    """The tensors in ``folder`` for a classifier on the meta device; those of its head that the files lack, or hold for
    other labels, are initialised anew and reported. Raises :class:`ConfigError` if the body is incomplete."""
    head = head_names(model)
    tensors, before = stored_tensors(folder, stored_fields(folder), report), as_stored(folder, model, AUTO)
    try:
        found = list(extended(stored(folder, before, report, optional=head, tensors=tensors), before, model))
        fresh = streaming.initialisation(model, seed)
        load_buffers(model, tensors)
    except streaming.CannotStreamError as reason:
        raise ConfigError(f"model.path {str(folder)!r} cannot be loaded for classification: {reason}") from reason
    missing = head - {name for name, _ in found}
    if missing:
        report(f"the head is new: {', '.join(sorted(missing))} start from random values (the folder has none that fit)")
    return _joined(found, fresh, missing)


def _joined(found: list, fresh: streaming.Source, missing: set[str]) -> streaming.Source:
    yield from found
    yield from ((name, rows) for name, rows in fresh if name in missing)


def logits_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """(rows, labels) in fp32; everything in ``batch`` but ``labels`` goes to the model."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return model(**inputs).logits.float()


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed over rows: cross entropy in nats for class ids, the squared error for numbers."""
    if labels.is_floating_point():
        return nn.functional.mse_loss(logits.squeeze(-1), labels, reduction="sum")
    return nn.functional.cross_entropy(logits, labels, reduction="sum")


def classification_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """:func:`label_loss` of ``model``'s logits."""
    return label_loss(logits_of(model, batch), batch["labels"])


def rehearsal_loss(outputs: int) -> Callable[[nn.Module, dict[str, Tensor]], Tensor]:
    """The loss for a memory plan, whose batches are a language model's: labels for every token."""

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        labels = batch["labels"][:, 0]
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return classification_loss(model, {**inputs, "labels": labels.float() if outputs == 1 else labels})

    return loss


def rows_in(batch: dict[str, Tensor]) -> int:
    return len(batch["labels"])


@dataclass(frozen=True)
class LabelEvaluation:
    """``loss``: mean over ``rows`` (see :func:`label_loss`); ``figures``: metrics by name, None where not defined."""

    loss: float
    rows: int
    figures: dict[str, float | None]

    def row(self) -> dict[str, Any]:
        """For metrics.jsonl."""
        return {"eval_loss": self.loss, **{f"eval_{name}": value for name, value in self.figures.items()}}

    def __str__(self) -> str:
        figures = [f"{name} {'undefined' if v is None else format(v, '.4f')}" for name, v in self.figures.items()]
        return " | ".join([f"held-out loss {self.loss:.4f}", *figures]) + f" ({counted(self.rows, 'row')})"


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Sequence[Callable[[], dict[str, Tensor]]],
    names: Sequence[str],
    device: torch.device,
    losses: Losses = one_by_one,
) -> LabelEvaluation:
    """Loss and the metrics ``names`` over all rows of ``batches`` (each a function that makes one), without dropout.
    ``losses``: how a model is run on several batches."""
    was_training, waiting = model.training, deque[Tensor]()

    def runs() -> Iterator[Callable[[], Tensor]]:
        for make in batches:
            batch = {name: value.to(device) for name, value in make().items()}
            waiting.append(batch["labels"])
            yield partial(logits_of, model, batch)

    model.eval()
    total, predicted, true = 0.0, [], []
    for logits in losses(runs()):
        labels = waiting.popleft()
        total += float(label_loss(logits, labels))
        predicted.append((logits.squeeze(-1) if labels.is_floating_point() else logits.argmax(-1)).cpu().numpy())
        true.append(labels.cpu().numpy())
    model.train(was_training)
    figures = metrics.compute(names, np.concatenate(predicted), np.concatenate(true))
    rows = sum(map(len, true))
    return LabelEvaluation(total / rows, rows, figures)
