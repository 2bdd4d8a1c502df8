"""The loop that turns documents into the flat arrays of a token file."""

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from qgalore.data.opening import Unfinished
from qgalore.data.sources import DocumentStream
from qgalore.errors import ConfigError, counted

# A batch is large enough for the tokenizer's threads and small enough to hold as Python integers.
_BATCH_DOCUMENTS = 1024
_BATCH_CHARACTERS = 4_000_000
_LINE_EVERY = 10.0  # seconds
_BAR_AFTER = 2.0  # seconds


@dataclass
class Totals:
    """What was written: counts, the largest id (-1 for none), what else is to be told, seconds since the start."""

    documents: int = 0
    tokens: int = 0
    blank: int = 0
    vocab_high: int = -1
    remarks: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def summary(self) -> str:
        seconds = time.monotonic() - self.started
        rate = self.tokens / max(seconds, 1e-9)
        blank = f" ({counted(self.blank, 'blank document')} skipped)" if self.blank else ""
        size = f"{counted(self.tokens, 'token')} of {counted(self.documents, 'document')}"
        return f"{size}{blank} in {seconds:.1f} s, {rate:,.0f} tokens/s"


def id_bound(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id that ``tokenizer`` knows."""
    # Added tokens may lie beyond len(tokenizer) where a vocabulary has holes.
    return max(len(tokenizer), max(tokenizer.get_vocab().values(), default=0) + 1)


def check_ids(ids: np.ndarray, bound: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ConfigError for ``ids`` of ``tokenizer`` that are not below its ``bound``."""
    if len(ids) and not 0 <= ids.min() <= ids.max() < bound:
        raise ConfigError(
            f"the tokenizer {tokenizer.name_or_path!r} gives the ids {ids.min()} to {ids.max()}, and its vocabulary "
            f"has {bound}; its files do not belong together."
        )


def id_dtype(tokenizer: PreTrainedTokenizerBase) -> np.dtype:
    """uint16 when every id of ``tokenizer`` fits it, else uint32."""
    return np.dtype(np.uint16 if id_bound(tokenizer) <= 2**16 else np.uint32)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The special tokens by id: those with a role (bos, eos, …) and those that are only marked as special, as
    ``<|im_start|>`` is in many vocabularies."""
    found = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    return found | {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What a text begins with: ``[bos]`` if the tokenizer itself puts it before a text, else nothing."""
    ids = tokenizer("a", add_special_tokens=True)["input_ids"]
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and ids[:1] == [bos] else []


def write_tokens(
    stream: DocumentStream,
    tokenizer: PreTrainedTokenizerBase,
    tokens_path: Path,
    offsets_path: Path,
    *,
    dtype: np.dtype,
    max_tokens: int | None,
    report: Callable[[str], None],
) -> Totals:
    """Tokenize ``stream`` into ``tokens_path``, flat ids of ``dtype``, and ``offsets_path``, int64 .npy. Documents that
    yield no token count as blank. Raises ConfigError when no token came of all of them, and OSError."""
    totals = Totals()
    offsets = [np.zeros(1, dtype=np.int64)]
    encoder = _Encoder(tokenizer)
    with tokens_path.open("wb") as file, Progress("tokens", totals.summary, lambda: totals.tokens, report) as progress:
        for texts in _batches(stream, max_tokens):
            ids, lengths = encoder.flat(texts)
            ends = totals.tokens + np.cumsum(lengths)
            if max_tokens is not None and totals.tokens + len(ids) >= max_tokens:
                ids = ids[: max_tokens - totals.tokens]
                ends = np.append(ends[ends < max_tokens], max_tokens)
            file.write(ids.astype(dtype).tobytes())
            totals.tokens += len(ids)
            totals.vocab_high = max(totals.vocab_high, int(ids.max(initial=-1)))
            offsets.append(ends)
            totals.documents += len(ends)
            progress.step()
            if totals.tokens == max_tokens:
                break
    if totals.tokens == 0:
        raise ConfigError(
            f"the tokenizer {tokenizer.name_or_path!r} made no token of {encoder.empty} documents; check both."
        )
    totals.blank = stream.blank + encoder.empty
    totals.remarks = [*stream.notes.lines(), *encoder.remarks()]
    np.save(offsets_path, np.concatenate(offsets))
    return totals


def _batches(stream: Iterator[str], max_tokens: int | None) -> Iterator[list[str]]:
    # A small max_tokens needs few documents; a token is seldom more than 8 characters, and too few just means another
    # batch.
    limit = _BATCH_CHARACTERS if max_tokens is None else min(_BATCH_CHARACTERS, 8 * max_tokens)
    batch: list[str] = []
    characters = 0
    for text in stream:
        batch.append(text)
        characters += len(text)
        if len(batch) >= _BATCH_DOCUMENTS or characters >= limit:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _Encoder:
    """Documents, whole or in pieces, as ids; ``empty`` counts those without one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.empty = 0
        self._tokenizer = tokenizer
        self._bound = id_bound(tokenizer)
        self._front = leading_ids(tokenizer)
        self._open = 0  # tokens of the document that is not finished
        unknown = tokenizer.unk_token_id
        self._unknown = -1 if unknown is None or unknown == tokenizer.eos_token_id else unknown
        self._special = np.array(sorted(set(special_tokens(tokenizer)) - {self._unknown}), dtype=np.int64)
        self._found: dict[int, int] = {}
        self._unknowns = 0

    def flat(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of ``texts`` (n,) int64, with bos and eos where they belong, and where in them each document of which
        they hold the end is over, as lengths (k,) int64."""
        # verbose: a document longer than the model's context is no mistake here, rows are cut later.
        encoded = self._tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )["input_ids"]
        parts: list[list[int]] = []
        lengths: list[int] = []
        length = 0
        for text, ids in zip(texts, encoded, strict=True):
            if ids:
                parts += [[*self._front, *ids] if self._open == 0 else ids]
                self._open += len(parts[-1])
                length += len(parts[-1])
            if isinstance(text, Unfinished):
                continue
            if self._open == 0:
                self.empty += 1
                continue
            parts.append([self._tokenizer.eos_token_id])
            lengths.append(length + 1)
            length, self._open = 0, 0
        self._count(encoded)
        # int64 first, so that an id that does not fit is noticed and never wrapped.
        flat = np.fromiter(itertools.chain.from_iterable(parts), dtype=np.int64)
        check_ids(flat, self._bound, self._tokenizer)
        return flat, np.array(lengths, dtype=np.int64)

    def _count(self, encoded: list[list[int]]) -> None:
        flat = np.fromiter(itertools.chain.from_iterable(encoded), dtype=np.int64)
        self._unknowns += int((flat == self._unknown).sum())
        hits = flat[np.isin(flat, self._special)]
        for token, count in zip(*np.unique(hits, return_counts=True), strict=True):
            self._found[int(token)] = self._found.get(int(token), 0) + int(count)

    def remarks(self) -> Iterator[str]:
        """What of the texts became tokens that are no text."""
        if self._found:
            names = self._tokenizer.convert_ids_to_tokens(sorted(self._found))
            counts = ", ".join(
                f"{name!r} {count} times" for name, (_, count) in zip(names, sorted(self._found.items()), strict=True)
            )
            yield (
                f"strings of special tokens inside the documents became those tokens: {counts}; to have them read as "
                'text, put "split_special_tokens": true into the tokenizer\'s tokenizer_config.json'
            )
        if self._unknowns:
            many = counted(self._unknowns, "token is", "tokens are")
            yield f"{many} {self._tokenizer.unk_token!r}: the tokenizer does not know their text"


class Progress:
    """A bar on a terminal, elsewhere a line now and then. ``line`` gives what is to be said so far, and ``count`` how
    many of ``unit`` there are."""

    def __init__(
        self,
        what: str,
        line: Callable[[], str],
        count: Callable[[], int],
        report: Callable[[str], None],
        unit: str = "tokens",
    ) -> None:
        self._what, self._line, self._count, self._report = what, line, count, report
        self._next_line = time.monotonic() + _LINE_EVERY
        self._bar = tqdm(desc=what, unit=f" {unit}", unit_scale=True, delay=_BAR_AFTER, leave=False, disable=None)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def step(self) -> None:
        if not self._bar.disable:
            self._bar.update(self._count() - self._bar.n)
        elif time.monotonic() >= self._next_line:
            self._report(f"{self._what}: {self._line()} so far")
            self._next_line = time.monotonic() + _LINE_EVERY
