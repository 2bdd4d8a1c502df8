"""Tokenized documents on disk: one flat array of ids, and where each document starts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from qgalore.data.cache import Paths, cache_inputs, cached
from qgalore.data.room import check_room
from qgalore.data.sources import documents
from qgalore.data.tokenizing import Totals, write_tokens


@dataclass(frozen=True)
class TokenFile:
    """Tokens of consecutive documents, or a part of them; nothing is copied.

    tokens: (n,) uint16 or uint32, read from disk as needed. offsets: (n_documents + 1,) int64, document i is
    ``tokens[offsets[i]:offsets[i + 1]]``. vocab_high: the largest id in the whole file, so a bound for every part of
    it. Of conversations also answers: (n,) bool, whether a token is an assistant's to say; row_length: documents lie
    within rows of so many tokens, which fill the file.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    vocab_high: int
    answers: np.ndarray | None = None
    row_length: int | None = None
    checksum: str = ""  # of the whole file and what it was made of

    @property
    def n_documents(self) -> int:
        return len(self.offsets) - 1

    def digest(self) -> str:
        """A fingerprint of the tokens: how many, in how many documents, 64 stretches of them, spread evenly, and every
        mark of an answer."""
        found = hashlib.sha256(f"{len(self.tokens)} {self.n_documents}".encode())
        step = max(1, len(self.tokens) // 64)
        for start in range(0, len(self.tokens), step):
            found.update(self.tokens[start : start + 1024].astype("<u4").tobytes())
        if self.answers is not None:
            found.update(f"rows of {self.row_length}".encode())
            found.update(np.packbits(self.answers).tobytes())
        return found.hexdigest()

    def split_tail(self, fraction: float) -> tuple[TokenFile, TokenFile]:
        """The front for training and the tail, about ``fraction`` of the tokens, for validation, as views. There are
        two tokens, or rows, at least.

        Cuts where a document starts, at the tail of at least ``fraction`` when there is one of at most twice that, else
        at one of at least half of it; when documents are too long for either, inside a document. Conversations are cut
        between rows.
        """
        total = len(self.tokens)
        if self.row_length is not None:
            rows = total // self.row_length
            cut = self.row_length * (rows - min(max(round(rows * fraction), 1), rows - 1))
        else:
            cut = self._cut(total, min(max(round(total * fraction), 1), total - 1))
        before, after = self.offsets[self.offsets < cut], self.offsets[self.offsets > cut]
        train = self._part(slice(cut), np.append(before, cut))
        return train, self._part(slice(cut, None), np.insert(after - cut, 0, 0))

    def _part(self, part: slice, offsets: np.ndarray) -> TokenFile:
        answers = None if self.answers is None else self.answers[part]
        return TokenFile(self.tokens[part], offsets, self.vocab_high, answers, self.row_length, self.checksum)

    def _cut(self, total: int, wanted: int) -> int:
        inner = self.offsets[1:-1]
        place = int(np.searchsorted(inner, total - wanted, side="right"))
        if place > 0 and total - inner[place - 1] <= 2 * wanted:
            return int(inner[place - 1])
        if place < len(inner) and 2 * (total - inner[place]) >= wanted:
            return int(inner[place])
        return total - wanted


def tokenize_to_disk(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    cache_dir: str | Path,
    text_key: str = "text",
    split: str = "train",
    max_tokens: int | None = None,
    report: Callable[[str], None] = print,
) -> TokenFile:
    """Tokenize ``source`` (see ``sources.documents``) into ``cache_dir``, or reuse what is there for the same input.

    Each document is its tokens without the tokenizer's own special tokens, then eos; and bos first if the tokenizer
    itself puts it before a text. ``max_tokens`` stops reading there, cutting the last document short. The folder (see
    ``cache.cached``) appears complete or not at all, so several processes may build it at once. Its key is made of the
    files' contents; a Hugging Face dataset is keyed by its id alone, so what changed on the Hub since is not seen.
    Raises ConfigError as ``documents`` does, for a tokenizer without eos, a source without a token, and a full disk.
    """
    inputs = cache_inputs(source, tokenizer, split=split, max_tokens=max_tokens, report=report)
    inputs["text_key"] = text_key

    def write(paths: Paths, dtype: np.dtype, report: Callable[[str], None]) -> Totals:
        how = {"text_key": text_key, "token_bytes": dtype.itemsize, "max_tokens": max_tokens}
        check_room(source, tokenizer, paths.tokens.parent.parent, **how)
        stream = documents(source, text_key=text_key, split=split)
        return write_tokens(
            stream, tokenizer, paths.tokens, paths.offsets, dtype=dtype, max_tokens=max_tokens, report=report
        )

    made = cached(inputs, tokenizer, write, cache_dir=cache_dir, report=report)
    return TokenFile(made.tokens, made.offsets, made.vocab_high, checksum=made.checksum)
