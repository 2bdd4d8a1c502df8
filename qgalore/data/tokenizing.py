"""The loop that turns documents into the flat arrays of a token file."""

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from qgalore.data.sources import DocumentStream
from qgalore.errors import ConfigError

# A batch is large enough for the tokenizer's threads and small enough to hold as Python integers.
_BATCH_DOCUMENTS = 1024
_BATCH_CHARACTERS = 4_000_000
_LINE_EVERY = 10.0  # seconds
_BAR_AFTER = 2.0  # seconds


@dataclass
class Totals:
    """What was written: counts, the largest id (-1 for none), and seconds since the start."""

    documents: int = 0
    tokens: int = 0
    blank: int = 0
    vocab_high: int = -1
    started: float = field(default_factory=time.monotonic)

    def summary(self) -> str:
        seconds = time.monotonic() - self.started
        rate = self.tokens / max(seconds, 1e-9)
        blank = f" ({self.blank} blank documents skipped)" if self.blank else ""
        return f"{self.tokens} tokens of {self.documents} documents{blank} in {seconds:.1f} s, {rate:,.0f} tokens/s"


def id_dtype(tokenizer: PreTrainedTokenizerBase) -> np.dtype:
    """uint16 when every id of ``tokenizer`` fits it, else uint32."""
    # Added tokens may lie beyond len(tokenizer) where a vocabulary has holes.
    size = max(len(tokenizer), max(tokenizer.get_vocab().values(), default=0) + 1)
    return np.dtype(np.uint16 if size <= 2**16 else np.uint32)


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
    """Tokenize ``stream`` into ``tokens_path``, flat ids of ``dtype``, and ``offsets_path``, int64 .npy.

    dtype: as ``id_dtype`` says. Documents that yield no token count as blank. Raises ConfigError when no token came of
    all of them, whatever ``stream`` raises, and OSError from writing.
    """
    totals = Totals()
    offsets = [np.zeros(1, dtype=np.int64)]
    empty = 0
    with tokens_path.open("wb") as file, _Progress(report, totals) as progress:
        for texts in _batches(stream, max_tokens):
            encoded = _encode(tokenizer, texts)
            empty += len(texts) - len(encoded)
            ends, high = _append(file, encoded, dtype, totals.tokens, max_tokens)
            if len(ends):
                offsets.append(ends)
                totals.documents += len(ends)
                totals.tokens = int(ends[-1])
                totals.vocab_high = max(totals.vocab_high, high)
            progress.step()
            if totals.tokens == max_tokens:
                break
    if totals.tokens == 0:
        raise ConfigError(f"the tokenizer {tokenizer.name_or_path!r} made no token of {empty} documents; check both.")
    totals.blank = stream.blank + empty
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


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    # verbose: a document longer than the model's context is no mistake here, rows are cut later.
    encoded = tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )["input_ids"]
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    front = [] if bos is None or bos == eos else [bos]
    return [[*front, *ids, eos] for ids in encoded if ids]


def _append(
    file: BinaryIO, encoded: list[list[int]], dtype: np.dtype, start: int, max_tokens: int | None
) -> tuple[np.ndarray, int]:
    """Write the ids; the documents' ends in the whole file (k,) int64, and the largest id."""
    lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
    # int64 first, so that an id that does not fit is noticed and never wrapped.
    flat = np.fromiter(itertools.chain.from_iterable(encoded), dtype=np.int64, count=int(lengths.sum()))
    ends = start + np.cumsum(lengths)
    if max_tokens is not None and len(ends) and ends[-1] > max_tokens:
        ends = ends[: int(np.searchsorted(ends, max_tokens)) + 1]
        ends[-1] = max_tokens
        flat = flat[: max_tokens - start]
    if not len(flat):
        return ends, -1
    high = int(flat.max())
    assert flat.min() >= 0
    assert high <= np.iinfo(dtype).max, f"token id {high} does not fit {dtype}"
    file.write(flat.astype(dtype).tobytes())
    return ends, high


class _Progress:
    """A bar on a terminal, elsewhere a line now and then."""

    def __init__(self, report: Callable[[str], None], totals: Totals):
        self._report = report
        self._totals = totals
        self._next_line = totals.started + _LINE_EVERY
        self._bar = tqdm(desc="tokens", unit=" tokens", unit_scale=True, delay=_BAR_AFTER, leave=False, disable=None)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def step(self) -> None:
        if not self._bar.disable:
            self._bar.update(self._totals.tokens - self._bar.n)
        elif time.monotonic() >= self._next_line:
            self._report(f"tokens: {self._totals.summary()} so far")
            self._next_line = time.monotonic() + _LINE_EVERY
