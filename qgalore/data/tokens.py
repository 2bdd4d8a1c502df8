"""Tokenized documents on disk: one flat array of ids, and where each document starts."""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from qgalore.data.sources import documents, fingerprint
from qgalore.data.tokenizing import Totals, id_dtype, write_tokens
from qgalore.errors import ConfigError

_VERSION = 1  # of the layout below; a change makes every old cache a miss
_TOKENS, _OFFSETS, _META, _ANSWERS = "tokens.bin", "offsets.npy", "meta.json", "answers.bin"

# Writes the token file in a folder, given the ids' dtype and where to report: (paths, dtype, report) → Totals.
Writer = Callable[["Paths", np.dtype, Callable[[str], None]], Totals]


@dataclass(frozen=True)
class Paths:
    """The files of a token file that is being written; ``answers`` belongs to conversations only."""

    tokens: Path
    offsets: Path
    answers: Path


@dataclass(frozen=True)
class TokenFile:
    """Tokens of consecutive documents, or a part of them; nothing is copied.

    tokens: (n,) uint16 or uint32, read from disk as needed. offsets: (n_documents + 1,) int64, document i is
    ``tokens[offsets[i]:offsets[i + 1]]``, offsets[0] is 0 and offsets[-1] is n. vocab_high: the largest id in the
    whole file, so a bound for every part of it.

    Of conversations also: answers: (n,) bool, whether a token is an assistant's to say; row_length: documents lie
    within rows of so many tokens, which fill the file.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    vocab_high: int
    answers: np.ndarray | None = None
    row_length: int | None = None

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
        """The front for training and the tail, about ``fraction`` of the tokens, for validation, as views.

        Cuts where a document starts, at the tail of at least ``fraction`` when there is one of at most twice that,
        else at one of at least half of it; when documents are too long for either, inside a document. Conversations
        are cut between rows.
        Raises ConfigError unless 0 < ``fraction`` < 1 and both parts get a token.
        """
        if not 0 < fraction < 1:
            raise ConfigError(f"the validation fraction is {fraction}; it must lie between 0 and 1, as 0.01 does.")
        total = len(self.tokens)
        if total < 2:
            raise ConfigError(f"{total} tokens cannot be split into training and validation; give more data.")
        if self.row_length is not None:
            cut = self.row_length * _rows_before(total // self.row_length, fraction)
        else:
            cut = self._cut(total, min(max(round(total * fraction), 1), total - 1))
        before, after = self.offsets[self.offsets < cut], self.offsets[self.offsets > cut]
        train = self._part(slice(cut), np.append(before, cut))
        return train, self._part(slice(cut, None), np.insert(after - cut, 0, 0))

    def _part(self, part: slice, offsets: np.ndarray) -> TokenFile:
        answers = None if self.answers is None else self.answers[part]
        return TokenFile(self.tokens[part], offsets, self.vocab_high, answers, self.row_length)

    def _cut(self, total: int, wanted: int) -> int:
        inner = self.offsets[1:-1]
        place = int(np.searchsorted(inner, total - wanted, side="right"))
        if place > 0 and total - inner[place - 1] <= 2 * wanted:
            return int(inner[place - 1])
        if place < len(inner) and 2 * (total - inner[place]) >= wanted:
            return int(inner[place])
        return total - wanted


def _rows_before(rows: int, fraction: float) -> int:
    """How many of ``rows`` rows of conversations are for training when ``fraction`` of them is held out."""
    if rows < 2:
        raise ConfigError(f"{rows} row of conversations cannot be split into training and validation; give more data.")
    return rows - min(max(round(rows * fraction), 1), rows - 1)


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
    has a bos other than eos. ``max_tokens`` stops reading there, cutting the last document short.
    A folder of ``cache_dir`` named by the key holds tokens.bin (uint16 up to 65536 ids, else uint32), offsets.npy
    (int64) and meta.json; it appears complete or not at all, so several processes may build it at once. A killed
    process leaves a folder ``.building-...`` behind, which may be deleted. A Hugging Face dataset is keyed by its id
    alone: what changed on the Hub since is not seen. Prints what was done, and tokens/s about every 10 seconds.

    Raises ConfigError as ``documents`` does, for a tokenizer without eos, ``max_tokens`` below 1, a source without a
    token, and a ``cache_dir`` that cannot be written (disk full, permissions).
    """
    inputs = cache_inputs(source, tokenizer, split=split, max_tokens=max_tokens) | {"text_key": text_key}

    def write(paths: Paths, dtype: np.dtype, report: Callable[[str], None]) -> Totals:
        stream = documents(source, text_key=text_key, split=split)
        return write_tokens(
            stream, tokenizer, paths.tokens, paths.offsets, dtype=dtype, max_tokens=max_tokens, report=report
        )

    return cached(inputs, id_dtype(tokenizer), write, cache_dir=cache_dir, report=report)


def cache_inputs(source: str, tokenizer: PreTrainedTokenizerBase, *, split: str, max_tokens: int | None) -> dict:
    """What tokens of any kind depend on, for :func:`cached`. Raises ConfigError for what no tokens can be made of."""
    if max_tokens is not None and max_tokens < 1:
        raise ConfigError(f"max_tokens is {max_tokens}; it must be at least 1, or not set.")
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"tokenizer {tokenizer.name_or_path!r} has no end-of-document token; set eos_token in its "
            "tokenizer_config.json."
        )
    return {
        "version": _VERSION,
        "source": source,
        "fingerprint": fingerprint(source),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "split": split,
        "max_tokens": max_tokens,
    }


def cached(
    inputs: dict, dtype: np.dtype, write: Writer, *, cache_dir: str | Path, report: Callable[[str], None]
) -> TokenFile:
    """The token file in ``cache_dir`` that was made of ``inputs`` (JSON; they name its folder), or ``write`` makes it.

    Conversations have a ``row_length`` in ``inputs``. Raises ConfigError as ``write`` does, and for a ``cache_dir``
    that cannot be written.
    """
    key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    folder = Path(cache_dir).expanduser() / key[:32]
    try:
        found = _open(folder, inputs, report)
        if found is None:
            return _build(folder, inputs, dtype, write, report)
    except OSError as error:
        raise ConfigError(
            f"the token cache {str(folder.parent)!r} cannot be used ({error.strerror or error}); free some space or "
            "set another folder for it."
        ) from error
    size = f"{len(found.tokens)} tokens of {found.n_documents} documents"
    report(f"tokens: {inputs['source']}: {size} reused from {folder}")
    return found


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hex sha256 of everything in ``tokenizer`` that the ids on disk depend on."""
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        # Calls with truncation or padding leave these behind; tokenizing for the disk uses neither.
        state.pop("truncation", None)
        state.pop("padding", None)
    else:
        state = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    whole = {"state": state, "bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def _build(folder: Path, inputs: dict, dtype: np.dtype, write: Writer, report: Callable[[str], None]) -> TokenFile:
    building = folder.parent / f".building-{folder.name}-{uuid.uuid4().hex}"
    building.mkdir(parents=True)
    try:
        totals = write(Paths(building / _TOKENS, building / _OFFSETS, building / _ANSWERS), dtype, report)
        _write_meta(building / _META, inputs, totals, dtype)
        report(f"tokens: {inputs['source']}: {totals.summary()}, written to {folder}")
        return _publish(building, folder, inputs, report)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _write_meta(path: Path, inputs: dict, totals: Totals, dtype: np.dtype) -> None:
    meta = {
        **inputs,
        "tokens": totals.tokens,
        "documents": totals.documents,
        "blank_documents": totals.blank,
        "vocab_high": totals.vocab_high,
        "dtype": dtype.name,
    }
    path.write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")


def _open(folder: Path, inputs: dict, report: Callable[[str], None]) -> TokenFile | None:
    """The token file in ``folder``; None when it is not there, or damaged, which prints a line."""
    if not folder.exists():
        return None
    try:
        meta = json.loads((folder / _META).read_text(encoding="utf-8"))
        differing = [name for name, value in inputs.items() if meta[name] != value]
        if differing:
            raise ValueError(f"{_META} disagrees on {', '.join(differing)}")
        dtype = np.dtype(meta["dtype"])
        size = (folder / _TOKENS).stat().st_size
        if size != meta["tokens"] * dtype.itemsize:
            raise ValueError(f"{_TOKENS} has {size} bytes where {_META} says {meta['tokens']} {dtype.name} tokens")
        offsets = np.load(folder / _OFFSETS, allow_pickle=False)
        if offsets.shape != (meta["documents"] + 1,) or offsets[0] != 0 or offsets[-1] != meta["tokens"]:
            raise ValueError(f"{_OFFSETS} does not fit {meta['documents']} documents of {meta['tokens']} tokens")
        tokens = np.memmap(folder / _TOKENS, dtype=dtype, mode="r")
        answers = _open_answers(folder / _ANSWERS, len(tokens)) if "row_length" in inputs else None
    except (FileNotFoundError, ValueError, KeyError, TypeError, EOFError) as error:
        report(f"tokens: the cache {folder} is damaged ({type(error).__name__}: {error}) and is built again")
        return None
    return TokenFile(tokens, offsets, meta["vocab_high"], answers, inputs.get("row_length"))


def _open_answers(path: Path, tokens: int) -> np.ndarray:
    if path.stat().st_size != tokens:
        raise ValueError(f"{_ANSWERS} has {path.stat().st_size} bytes for {tokens} tokens")
    return np.memmap(path, dtype=np.bool_, mode="r")


def _publish(building: Path, folder: Path, inputs: dict, report: Callable[[str], None]) -> TokenFile:
    """Give the finished ``building`` its name, unless another process was first with a good one."""
    while True:
        try:
            building.rename(folder)
        except OSError:
            # A folder that is not empty cannot be renamed over; any other failure is the caller's to report.
            if not folder.exists():
                raise
            first = _open(folder, inputs, report)
            if first is not None:
                return first
            damaged = building.with_name(f"{building.name}-damaged-{uuid.uuid4().hex}")
            folder.rename(damaged)
            shutil.rmtree(damaged, ignore_errors=True)
        else:
            built = _open(folder, inputs, report)
            assert built is not None, f"{folder} was written and cannot be read back"
            return built
