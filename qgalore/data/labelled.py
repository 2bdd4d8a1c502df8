"""Tables of texts with a label each (classification, regression), and padded batches of them."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..errors import ConfigError
from .notes import Notes, listed, short
from .paths import close_names
from .tables import ENDINGS, table_rows


@dataclass(frozen=True)
class Example:
    """One or two texts, and the label as it is written in the file."""

    texts: tuple[str, ...]
    label: str


@dataclass(frozen=True)
class Labels:
    """What the labels of a data set mean: the names of the classes in the order of their ids, or None for numbers."""

    names: tuple[str, ...] | None

    @property
    def outputs(self) -> int:
        """How many logits a model needs."""
        return 1 if self.names is None else len(self.names)

    @classmethod
    def of(cls, examples: Sequence[Example], kind: str) -> "Labels":
        """The labels that occur, whole numbers in their order, anything else alphabetically. ``kind``: class | number.
        Raises :class:`ConfigError` for fewer than two classes."""
        if kind == "number":
            return cls(None)
        found = {example.label for example in examples}
        if len(found) < 2:
            raise ConfigError(f"data.train has only the label {short(min(found))}; a classifier needs at least two")
        whole = all(re.fullmatch("-?[0-9]{1,18}", label) for label in found)
        return cls(tuple(sorted(found, key=(lambda label: (int(label), label)) if whole else str)))

    def encode(self, examples: Sequence[Example], key: str) -> np.ndarray:
        """Class ids (int64), or the numbers (float32). Raises :class:`ConfigError`, naming ``key``, for others."""
        if self.names is None:
            return np.array([_number(example.label, key) for example in examples], dtype=np.float32)
        ids = {name: number for number, name in enumerate(self.names)}
        for example in examples:
            if example.label not in ids:
                raise ConfigError(
                    f"{key} has the label {short(example.label)}, and data.train has only "
                    f"{listed(self.names)}; add examples of it to data.train, or take it out"
                )
        return np.array([ids[example.label] for example in examples], dtype=np.int64)


def _number(text: str, key: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not np.isfinite(value):
        raise ConfigError(
            f"{key} has the label {short(text)}, which is not a number; set data.label_type=class for names"
        )
    return value


def read_examples(
    source: str, *, text_keys: Sequence[str], label_key: str, header: bool = True, notes: Notes | None = None
) -> list[Example]:
    """The rows of a local file with one of ``tables.ENDINGS``. Without ``header`` a table's columns are called "0",
    "1", …. notes: gets what was changed. Raises :class:`ConfigError` for rows that are no examples, and if there are
    none."""
    found = list(examples_of(source, text_keys=text_keys, label_key=label_key, header=header, notes=notes))
    if not found:
        raise ConfigError(f"data source {source!r} has no rows")
    return found


def examples_of(
    source: str, *, text_keys: Sequence[str], label_key: str, header: bool = True, notes: Notes | None = None
) -> Iterator[Example]:
    """As :func:`read_examples`, one after the other."""
    path = Path(source).expanduser()
    if not path.is_file():
        raise ConfigError(f"data source {source!r} is not a file. {close_names(path)}".rstrip())
    if not path.name.lower().endswith(ENDINGS):
        raise ConfigError(f"{source!r}: labelled data is read from {', '.join(ENDINGS)}; convert it to one of them")
    for row, where in table_rows(path, header, [*text_keys, label_key], Notes() if notes is None else notes):
        texts = [_cell(row, key, where) for key in text_keys]
        yield Example(tuple(texts), _cell(row, label_key, where))


def _cell(row: dict[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if value is None:
        raise ConfigError(
            f"{where} has no {key!r}; its keys are {listed(row)}: set data.text_keys and "
            "data.label_key (and data.header: false for a table without a first line of names)"
        )
    if not isinstance(value, (str, int, float)) or value != value:
        shown = "not a number" if isinstance(value, float) else f"of type {type(value).__name__}"
        raise ConfigError(f"{where}: {key!r} is {shown}; it must be a text or a number: choose another key")
    return str(value).strip()


class LabelledTexts:
    """Tokenized examples with their labels, padded on the right to the longest of a batch. ``truncated`` counts those
    that were cut to ``max_length`` tokens (of a pair the longer text is cut first)."""

    def __init__(
        self, examples: Sequence[Example], labels: np.ndarray, tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> None:
        """``labels``: (examples,) int64 or float32. Raises :class:`ConfigError` for a tokenizer that cannot pad."""
        if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
            raise ConfigError("the tokenizer has neither a padding nor an end-of-text token; batches cannot be padded")
        self.labels = torch.from_numpy(labels)
        self.pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        columns = list(zip(*(example.texts for example in examples), strict=True))
        whole = tokenizer(*map(list, columns), add_special_tokens=True, verbose=False)
        self.truncated = sum(len(ids) > max_length for ids in whole["input_ids"])
        cut = tokenizer(*map(list, columns), truncation=True, max_length=max_length) if self.truncated else whole
        self._ids = [torch.tensor(ids, dtype=torch.int64, device="cpu") for ids in cut["input_ids"]]
        kinds = cut.get("token_type_ids")  # which of two texts a token belongs to, for models that are told
        self._kinds = None if kinds is None else [torch.tensor(row, dtype=torch.int64, device="cpu") for row in kinds]

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def tokens(self) -> int:
        return sum(map(len, self._ids))

    @property
    def highest_id(self) -> int:
        return max(self.pad_id, *(int(row.max()) for row in self._ids if len(row)))

    def digest(self) -> str:
        """Of tokens and labels, for a resumed run to recognise its data."""
        digest = hashlib.sha256(self.labels.numpy().tobytes())
        for row in self._ids:
            digest.update(row.numpy().tobytes() + b"|")
        return digest.hexdigest()[:16]

    def batch(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """``input_ids``, ``attention_mask`` and, for models that know two segments, ``token_type_ids``, each int64
        (rows, longest); ``labels`` (rows,)."""
        rows = [int(index) for index in indices]
        if any(not 0 <= row < len(self) for row in rows):
            raise IndexError(f"sample indices {min(rows)} .. {max(rows)} go outside 0 .. {len(self) - 1}")

        def padded(parts: list[torch.Tensor], value: int) -> torch.Tensor:
            return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=value)

        ids = [self._ids[row] for row in rows]
        batch = {"input_ids": padded(ids, self.pad_id), "attention_mask": padded([torch.ones_like(r) for r in ids], 0)}
        if self._kinds is not None:
            batch["token_type_ids"] = padded([self._kinds[row] for row in rows], 0)
        return {**batch, "labels": self.labels[rows]}
