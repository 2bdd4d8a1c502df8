"""Labelled data of a run with ``data.task: classify``."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..config import Config
from ..data.labelled import LabelledTexts, Labels, read_examples
from ..data.mixing import MixedOrder, Mixture
from ..data.notes import Notes
from ..errors import counted
from ..evaluation.loss import Batches, Losses, one_by_one
from ..evaluation.metrics import OF_CLASSES, OF_NUMBERS
from ..models import classify
from . import parts
from .data import Data
from .model import Vocabulary
from .say import say
from .sources import epochs_of

PLANNED = Labels(("0", "1"))  # before the data are read; a few labels more weigh nothing


@dataclass(frozen=True)
class LabelledData:
    """The training and held-out examples, and the labels of the former."""

    train: LabelledTexts
    valid: LabelledTexts
    labels: Labels

    def data(self) -> Data:
        described = f"{len(self.train)} examples {self.train.digest()}"
        return Data(Mixture(("",), (1,), (self.train,)), {"": self.valid}, self.train.highest_id, described)

    def vocabulary(self, before: Vocabulary) -> Vocabulary:
        return replace(before, labels=self.labels, padding=self.train.pad_id)


def read(config: Config, tokenizer: PreTrainedTokenizerBase) -> LabelledData:
    """Read and tokenize ``data.train`` and ``data.valid``. Raises :class:`ConfigError` for what cannot be used."""
    data = config.data
    keys = {"text_keys": data.text_keys, "label_key": data.label_key, "header": data.header}
    examples = {}
    for key, source in data.all_sources.items():
        notes = Notes()
        examples[key] = read_examples(source.path, notes=notes, **keys)
        for line in notes.lines():
            say("note", f"{key}: {line}")
    if data.max_tokens is not None:
        say("note", "data.max_tokens has no effect with data.task: classify, which reads all examples")
    labels = Labels.of(examples["data.train"], data.label_type)
    texts = {}
    for key, rows in examples.items():
        texts[key] = LabelledTexts(rows, labels.encode(rows, key), tokenizer, data.sequence_length)
        if texts[key].truncated:
            many = counted(texts[key].truncated, f"example of {key} is", f"examples of {key} are")
            say("note", f"{many} cut to {data.sequence_length} tokens")
    train, valid = texts.values()
    epochs = epochs_of(config, len(train))
    kind = "numbers" if labels.names is None else f"{len(labels.names)} classes ({', '.join(labels.names[:8])})"
    say(
        "data",
        f"{counted(len(train), 'example')}, {counted(train.tokens, 'token')} ({epochs:.2f} epochs), labels: {kind}; "
        f"held out: {len(valid):,}",
    )
    return LabelledData(train, valid, labels)


def loop_data(
    config: Config, examples: LabelledData, order_for: Callable[[int], MixedOrder], losses: Losses = one_by_one
) -> parts.Data:
    """Labelled data as the loop takes them. ``losses``: how the held-out batches go through the model."""
    labels = examples.labels
    known = OF_NUMBERS if labels.names is None else OF_CLASSES
    names = config.data.metric or list(known)
    looking = partial(_evaluate, names=names, losses=losses)
    return parts.Data(examples.train, {"": examples.valid}, order_for, classify.rows_in, looking, unit="rows")


def _evaluate(model: nn.Module, sets: Mapping[str, Batches], **how: Any) -> parts.Evaluation:
    """Of the only held-out set: metrics of several could not be put together from those of each."""
    (batches,) = sets.values()
    return classify.evaluate(model, batches, **how)
