"""Conversations as tokens on disk, laid out in rows so that no answer is parted from its question."""

import functools
import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import BinaryIO

import numpy as np
from transformers import PreTrainedTokenizerBase

from qgalore.data.cache import Paths, cache_inputs, cached
from qgalore.data.chat import Rendered, encode
from qgalore.data.conversations import Messages, conversations
from qgalore.data.notes import Notes
from qgalore.data.sources import ROW_ENDINGS
from qgalore.data.templates import writes_date
from qgalore.data.tokenizing import Progress, Totals, check_ids, id_bound, special_tokens
from qgalore.data.tokens import TokenFile
from qgalore.errors import ConfigError, counted

# Conversations that are tokenized, and fitted into rows, together
_BATCH, _BATCH_CHARACTERS = 1024, 1 << 24


@dataclass
class InstructTotals(Totals):
    """What was written, and of the conversations how many were cut, left out for want of an answer, or hold strings of
    special tokens; ``endless`` counts answers without a mark at their end."""

    answers: int = 0
    cut: int = 0
    without_answer: int = 0
    padding: int = 0
    endless: int = 0
    quoting: int = 0
    offsets: list[int] = field(default_factory=lambda: [0])

    def summary(self) -> str:
        notes = f"{self.answers} of them in answers, {self.padding} padding"
        if self.cut:
            many = counted(
                self.cut,
                "conversation longer than sequence_length was",
                "conversations longer than sequence_length were",
            )
            notes += f"; {many} cut short"
        if self.without_answer:
            notes += f"; {self.without_answer} without an answer to learn (or none before the cut) were left out"
        return f"{super().summary()}; {notes}"

    def close(self, notes: Notes) -> None:
        self.remarks = list(notes.lines())
        if self.endless:
            self.remarks.append(
                f"the chat template writes no mark at the end of {counted(self.endless, 'answer')}, so that the model "
                "does not learn from them to stop; use a template that ends an answer with a token, such as the "
                "tokenizer's eos"
            )
        if self.quoting:
            many = counted(self.quoting, "conversation says", "conversations say")
            self.remarks.append(
                f"{many} strings of special tokens, which become those tokens; take the "
                "strings out if they are not meant as marks"
            )


def conversations_to_disk(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    cache_dir: str | Path,
    sequence_length: int,
    split: str = "train",
    max_tokens: int | None = None,
    day: date | None = None,
    report: Callable[[str], None] = print,
) -> TokenFile:
    """Tokenize the conversations of ``source`` into ``cache_dir``, or reuse what is there.

    As ``tokens.tokenize_to_disk``, with three differences. Beside the tokens answers.bin holds a byte for each, 1 where
    it is an assistant's to say. Each conversation lies within one row of ``sequence_length`` tokens, cut short if it is
    longer, and end-of-text tokens that are no targets fill the row. And ``max_tokens`` cuts nothing: it is passed by up
    to 1,024 conversations. ``day``: the date for a chat template that writes one (None: today).
    """
    inputs = cache_inputs(source, tokenizer, split=split, max_tokens=max_tokens, report=report, endings=ROW_ENDINGS)
    template = hashlib.sha256(repr(tokenizer.chat_template).encode()).hexdigest()
    inputs |= {"task": "instruct", "row_length": sequence_length, "template": template}
    if writes_date(tokenizer):
        day = date.today() if day is None else day
        inputs["day"] = day.isoformat()

    def write(paths: Paths, dtype: np.dtype, report: Callable[[str], None]) -> Totals:
        return _Writer(tokenizer, sequence_length, dtype, day).write(source, split, max_tokens, paths, report)

    made = cached(inputs, tokenizer, write, cache_dir=cache_dir, report=report)
    return TokenFile(made.tokens, made.offsets, made.vocab_high, made.answers, sequence_length, made.checksum)


class _Writer:
    """Conversations to rows of ``length`` tokens in files."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int, dtype: np.dtype, day: date | None) -> None:
        self._tokenizer, self._length, self._dtype, self._day = tokenizer, length, dtype, day
        self._bound = id_bound(tokenizer)
        # No token is longer, so that what is cut from a text here would be cut from its ids too.
        self._longest = (length + 1) * max(map(len, tokenizer.get_vocab()))
        self._totals = InstructTotals()
        special = sorted(special_tokens(tokenizer).values(), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special)) or "(?!)")

    def write(
        self, source: str, split: str, max_tokens: int | None, paths: Paths, report: Callable[[str], None]
    ) -> InstructTotals:
        totals, notes = self._totals, Notes()
        stream = conversations(source, split=split, notes=notes)
        progress = Progress("tokens", totals.summary, lambda: totals.tokens, report)
        with paths.tokens.open("wb") as tokens, paths.answers.open("wb") as answers, progress:
            for batch in iter(functools.partial(_next, stream), []):
                kept = list(self._usable(batch))
                for row in fit([len(one.ids) for one in kept], self._length):
                    self._append(tokens, answers, [kept[i] for i in row])
                progress.step()
                if max_tokens is not None and totals.tokens >= max_tokens:
                    break
        if totals.documents == 0:
            marked = f" ({notes.not_learned} turns are marked as not to be learned)" if notes.not_learned else ""
            raise ConfigError(
                f"none of the {totals.without_answer} conversations of {source!r} has an answer to learn within "
                f"sequence_length {self._length}{marked}; give a longer sequence_length, or rows with an assistant's "
                "turn that is to be learned."
            )
        np.save(paths.offsets, np.array(totals.offsets, dtype=np.int64))
        totals.close(notes)
        return totals

    def _usable(self, batch: list[tuple[Messages, str]]) -> Iterator[Rendered]:
        """The conversations cut to the rows' length, without those that then have no answer; counted."""
        totals, length = self._totals, self._length
        for (messages, _), one in zip(batch, encode(self._tokenizer, batch, self._day, self._longest), strict=True):
            short = Rendered(one.ids[:length], one.answer[:length])
            if not short.answer[1:].any():  # nothing comes before the first token from which it could be foretold
                totals.without_answer += 1
                continue
            totals.cut += len(one.ids) > length
            totals.endless += one.endless
            totals.quoting += any(self._special.search(turn["content"]) for turn in messages)
            yield short

    def _append(self, tokens: BinaryIO, answers: BinaryIO, row: list[Rendered]) -> None:
        """Write one row. What fills it counts to its last conversation, where nothing can see it."""
        totals, length = self._totals, self._length
        ids = np.concatenate([one.ids for one in row])
        marks = np.concatenate([one.answer for one in row])
        ends = totals.tokens + np.cumsum([len(one.ids) for one in row])
        empty = length - len(ids)
        ids = np.pad(ids, (0, empty), constant_values=self._tokenizer.eos_token_id)
        ends[-1] = totals.tokens + length
        check_ids(ids, self._bound, self._tokenizer)
        tokens.write(ids.astype(self._dtype).tobytes())
        answers.write(np.pad(marks, (0, empty)).astype(np.uint8).tobytes())
        totals.offsets.extend(ends.tolist())
        totals.documents += len(row)
        totals.tokens += length
        totals.answers += int(marks.sum())
        totals.padding += empty
        totals.vocab_high = max(totals.vocab_high, int(ids.max()))


def _next(stream: Iterator[tuple[Messages, str]]) -> list[tuple[Messages, str]]:
    batch, characters = [], 0
    for messages, where in stream:
        batch.append((messages, where))
        characters += sum(len(turn["content"]) for turn in messages)
        if len(batch) >= _BATCH or characters >= _BATCH_CHARACTERS:
            break
    return batch


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
