"""Conversations as tokens on disk, laid out in rows so that no answer is parted from its question."""

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from qgalore.data.chat import Rendered, encode
from qgalore.data.conversations import conversations
from qgalore.data.tokenizing import Totals, id_dtype
from qgalore.data.tokens import Paths, TokenFile, cache_inputs, cached
from qgalore.errors import ConfigError

_BATCH = 1024  # conversations that are tokenized, and fitted into rows, together


@dataclass
class InstructTotals(Totals):
    """What was written, and of the conversations how many were cut, and left out for want of an answer."""

    answers: int = 0
    cut: int = 0
    without_answer: int = 0
    padding: int = 0
    offsets: list[int] = field(default_factory=lambda: [0])

    def summary(self) -> str:
        notes = f"{self.answers} of them in answers, {self.padding} padding"
        if self.cut:
            notes += f"; {self.cut} conversations longer than sequence_length were cut short"
        if self.without_answer:
            notes += f"; {self.without_answer} without an answer (or none before the cut) were left out"
        return f"{super().summary()}; {notes}"


def conversations_to_disk(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    cache_dir: str | Path,
    sequence_length: int,
    split: str = "train",
    max_tokens: int | None = None,
    report: Callable[[str], None] = print,
) -> TokenFile:
    """Tokenize the conversations of ``source`` (see ``conversations``) into ``cache_dir``, or reuse what is there.

    As ``tokens.tokenize_to_disk``, with three differences. Beside the tokens answers.bin holds a byte for each, 1 where
    it is an assistant's to say (see ``chat.encode``). The file is made of rows of ``sequence_length`` tokens: each
    conversation lies within one, cut short if it is longer, and end-of-text tokens that are no targets fill the row.
    And ``max_tokens``, which stops reading there, cuts nothing: it is passed by up to 1,024 conversations.
    The chat template belongs to the key.

    Raises ConfigError as ``tokenize_to_disk``, ``conversations`` and ``chat.encode`` do, and if no conversation has
    an answer.
    """
    inputs = cache_inputs(source, tokenizer, split=split, max_tokens=max_tokens)
    template = hashlib.sha256(repr(tokenizer.chat_template).encode()).hexdigest()
    inputs |= {"task": "instruct", "row_length": sequence_length, "template": template}

    def write(paths: Paths, dtype: np.dtype, report: Callable[[str], None]) -> Totals:
        return _write(source, split, tokenizer, paths, dtype, sequence_length, max_tokens)

    return cached(inputs, id_dtype(tokenizer), write, cache_dir=cache_dir, report=report)


def _write(
    source: str,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    paths: Paths,
    dtype: np.dtype,
    length: int,
    max_tokens: int | None,
) -> InstructTotals:
    totals = InstructTotals()
    stream = conversations(source, split=split)
    with paths.tokens.open("wb") as tokens, paths.answers.open("wb") as answers:
        for batch in iter(functools.partial(_next, stream), []):
            kept = list(_usable(encode(tokenizer, batch), length, totals))
            for row in fit([len(one.ids) for one in kept], length):
                _append(tokens, answers, [kept[i] for i in row], dtype, length, tokenizer.eos_token_id, totals)
            if max_tokens is not None and totals.tokens >= max_tokens:
                break
    if totals.documents == 0:
        raise ConfigError(
            f"none of the {totals.without_answer} conversations of {source!r} has an answer within sequence_length "
            f"{length}; give a longer sequence_length, or rows with an assistant's turn."
        )
    np.save(paths.offsets, np.array(totals.offsets, dtype=np.int64))
    return totals


def _next(stream: Iterator) -> list:
    return list(itertools.islice(stream, _BATCH))


def _usable(rendered: list[Rendered], length: int, totals: InstructTotals) -> Iterator[Rendered]:
    """The conversations cut to ``length``, without those that then have no answer; counted."""
    for one in rendered:
        short = Rendered(one.ids[:length], one.answer[:length])
        if not short.answer[1:].any():  # nothing comes before the first token from which it could be foretold
            totals.without_answer += 1
            continue
        totals.cut += len(one.ids) > length
        yield short


def fit(lengths: list[int], length: int) -> list[list[int]]:
    """Rows of at most ``length``, each a list of indices into ``lengths``: the longest first, into the first row that
    has room. Needs at most 11/9 of the fewest rows, and 6/9 of a row more (Dósa 2007, for first-fit decreasing)."""
    rows: list[list[int]] = []
    room = np.zeros(len(lengths), dtype=np.int64)
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = int(np.argmax(room[: len(rows)] >= lengths[index])) if rows else 0
        if not rows or room[place] < lengths[index]:
            place = len(rows)
            rows.append([])
            room[place] = length
        rows[place].append(index)
        room[place] -= lengths[index]
    return rows


def _append(tokens, answers, row: list[Rendered], dtype, length: int, filler: int, totals: InstructTotals) -> None:
    """Write one row. What fills it counts to its last conversation, where nothing can see it."""
    ids = np.concatenate([one.ids for one in row])
    marks = np.concatenate([one.answer for one in row])
    ends = totals.tokens + np.cumsum([len(one.ids) for one in row])
    empty = length - len(ids)
    ids = np.pad(ids, (0, empty), constant_values=filler)
    ends[-1] = totals.tokens + length
    assert ids.min() >= 0
    assert ids.max() <= np.iinfo(dtype).max, f"token id {ids.max()} does not fit {dtype}"
    tokens.write(ids.astype(dtype).tobytes())
    answers.write(np.pad(marks, (0, empty)).astype(np.uint8).tobytes())
    totals.offsets.extend(ends.tolist())
    totals.documents += len(row)
    totals.tokens += length
    totals.answers += int(marks.sum())
    totals.padding += empty
    totals.vocab_high = max(totals.vocab_high, int(ids.max()))
