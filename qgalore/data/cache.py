"""Token files on disk: made once for the same input, checked byte by byte, and made again if they are damaged."""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from qgalore.data.checksums import file_digest, sync
from qgalore.data.paths import drop_empty, make_folder
from qgalore.data.sources import ENDINGS, fingerprint
from qgalore.data.tokenizing import Totals, id_bound, id_dtype, leading_ids
from qgalore.errors import ConfigError, counted

_VERSION = 4  # of the layout below and of how texts are read; a change makes every old cache a miss
_TOKENS, _OFFSETS, _META, _ANSWERS = "tokens.bin", "offsets.npy", "meta.json", "answers.bin"

Report = Callable[[str], None]
# Writes the token file in a folder, given the ids' dtype and where to report: (paths, dtype, report) → Totals.
Writer = Callable[["Paths", np.dtype, Report], Totals]


@dataclass(frozen=True)
class Paths:
    """The files of a token file that is being written; ``answers`` belongs to conversations only."""

    tokens: Path
    offsets: Path
    answers: Path

    @classmethod
    def of(cls, folder: Path) -> Paths:
        return cls(folder / _TOKENS, folder / _OFFSETS, folder / _ANSWERS)


@dataclass(frozen=True)
class Stored:
    """What a cache folder holds: the arrays of ``tokens.TokenFile``, and ``checksum``, of all their bytes."""

    tokens: np.ndarray
    offsets: np.ndarray
    answers: np.ndarray | None
    vocab_high: int
    checksum: str


def cache_inputs(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: str,
    max_tokens: int | None,
    report: Report,
    endings: tuple[str, ...] = ENDINGS,
) -> dict[str, Any]:
    """What tokens of any kind depend on, for :func:`cached`. Raises ConfigError for what no tokens can be made of."""
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"tokenizer {tokenizer.name_or_path!r} has no end-of-document token; set eos_token in its "
            "tokenizer_config.json."
        )
    return {
        "version": _VERSION,
        "source": source,
        "fingerprint": fingerprint(source, endings, report=report),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "split": split,
        "max_tokens": max_tokens,
    }


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hex sha256 of everything in ``tokenizer`` that the ids on disk depend on."""
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        # Calls with truncation or padding leave these behind; tokenizing for the disk uses neither.
        state.pop("truncation", None)
        state.pop("padding", None)
    else:
        state = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    whole = {"state": state, "bos": leading_ids(tokenizer), "eos": tokenizer.eos_token_id}
    whole["split_special_tokens"] = bool(getattr(tokenizer, "split_special_tokens", False))
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def cached(
    inputs: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    write: Writer,
    *,
    cache_dir: str | Path,
    report: Report,
) -> Stored:
    """The token file in ``cache_dir`` that was made of ``inputs`` (JSON; they name its folder), or ``write`` makes it.
    A damaged one is reported and made again. Conversations have a ``row_length`` in ``inputs``. Raises ConfigError as
    ``write`` does, and for a ``cache_dir`` that cannot be written."""
    key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    folder = Path(cache_dir).expanduser() / key[:32]
    here = _Folder(folder, inputs, id_bound(tokenizer), report)
    try:
        found = here.open()
        if found is None:
            return here.build(id_dtype(tokenizer), write)
    except BrokenPipeError:  # of a line that was printed, as with ``| head``; the cache is not what is wrong
        raise
    except OSError as error:
        raise ConfigError(
            f"the token cache {str(folder.parent)!r} cannot be used ({error.strerror or error}); free some space or "
            "set another folder for it."
        ) from error
    size = f"{counted(len(found.tokens), 'token')} of {counted(len(found.offsets) - 1, 'document')}"
    report(f"tokens: {inputs['source']}: {size} reused from {folder}")
    for remark in here.remarks:
        report(f"tokens: {inputs['source']}: {remark}")
    return found


def _meta_checksum(meta: dict[str, Any]) -> str:
    rest = {name: value for name, value in meta.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


class _Folder:
    """One folder of the cache. ``remarks``: what was noticed when the token file was made."""

    def __init__(self, folder: Path, inputs: dict[str, Any], bound: int, report: Report) -> None:
        self.remarks: list[str] = []
        self._folder, self._inputs, self._bound, self._report = folder, inputs, bound, report
        self._files = (_TOKENS, _OFFSETS, *([_ANSWERS] if "row_length" in inputs else []))

    def open(self) -> Stored | None:
        """The token file; None when it is not there, or damaged, which prints a line."""
        if not self._folder.exists():
            return None
        try:
            return self._checked()
        except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, EOFError, RecursionError) as e:
            self._report(f"tokens: the cache {self._folder} is damaged ({type(e).__name__}: {e}) and is built again")
            return None

    def _checked(self) -> Stored:
        folder = self._folder
        meta = json.loads((folder / _META).read_text(encoding="utf-8"))
        if differing := [name for name, value in self._inputs.items() if meta[name] != value]:
            raise ValueError(f"{_META} disagrees on {', '.join(differing)}")
        if meta["checksum"] != _meta_checksum(meta):
            raise ValueError(f"{_META} has changed since it was written")
        for name in self._files:
            size, wanted = (folder / name).stat().st_size, meta["files"][name]
            if size != wanted["bytes"]:
                raise ValueError(f"{name} has {size} bytes where {_META} says {wanted['bytes']}")
            if file_digest(folder / name, self._report) != wanted["blake2b"]:
                raise ValueError(f"{name} has other bytes than were written")
        offsets = np.load(folder / _OFFSETS, allow_pickle=False)
        if offsets.shape != (meta["documents"] + 1,) or offsets[0] != 0 or offsets[-1] != meta["tokens"]:
            raise ValueError(f"{_OFFSETS} does not fit {meta['documents']} documents of {meta['tokens']} tokens")
        if meta["vocab_high"] >= self._bound:
            raise ValueError(f"{_TOKENS} has the id {meta['vocab_high']}, and the vocabulary {self._bound} entries")
        answers = None
        if _ANSWERS in self._files:
            answers = np.memmap(folder / _ANSWERS, dtype=np.bool_, mode="r")
        tokens = np.memmap(folder / _TOKENS, dtype=np.dtype(meta["dtype"]), mode="r")
        self.remarks = list(meta["remarks"])
        checksum = hashlib.sha256(json.dumps(meta["files"], sort_keys=True).encode()).hexdigest()
        return Stored(tokens, offsets, answers, meta["vocab_high"], checksum)

    def build(self, dtype: np.dtype, write: Writer) -> Stored:
        """Make the token file in a folder of its own, and give it its name when all is on the disk."""
        building = self._folder.parent / f".building-{self._folder.name}-{uuid.uuid4().hex}"
        made = make_folder(building)
        try:
            totals = write(Paths.of(building), dtype, self._report)
            self._write_meta(building, totals, dtype)
            for name in (*self._files, _META):
                sync(building / name)
            sync(building)
            self._report(f"tokens: {self._inputs['source']}: {totals.summary()}, written to {self._folder}")
            for remark in totals.remarks:
                self._report(f"tokens: {self._inputs['source']}: {remark}")
            return self._publish(building)
        finally:
            shutil.rmtree(building, ignore_errors=True)
            drop_empty(made[1:])

    def _write_meta(self, building: Path, totals: Totals, dtype: np.dtype) -> None:
        files = {}
        for name in self._files:
            path = building / name
            files[name] = {"bytes": path.stat().st_size, "blake2b": file_digest(path, self._report)}
        meta = {
            **self._inputs,
            "tokens": totals.tokens,
            "documents": totals.documents,
            "blank_documents": totals.blank,
            "vocab_high": totals.vocab_high,
            "dtype": dtype.name,
            "remarks": totals.remarks,
            "files": files,
        }
        meta["checksum"] = _meta_checksum(meta)
        (building / _META).write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")

    def _publish(self, building: Path) -> Stored:
        """Give the finished ``building`` its name, unless another process was first with a good one."""
        folder = self._folder
        while True:
            try:
                building.rename(folder)
            except OSError:
                # A folder that is not empty cannot be renamed over; any other failure is the caller's to report.
                if not folder.exists():
                    raise
                first = self.open()
                if first is not None:
                    return first
                damaged = building.with_name(f"{building.name}-damaged-{uuid.uuid4().hex}")
                folder.rename(damaged)
                shutil.rmtree(damaged, ignore_errors=True)
                damaged.unlink(missing_ok=True)  # where it was no folder
            else:
                sync(folder.parent)
                built = self.open()
                if built is None:
                    raise ConfigError(
                        f"{folder} was written and reads back as something else; check the disk, or set another folder "
                        "for the cache."
                    )
                return built
