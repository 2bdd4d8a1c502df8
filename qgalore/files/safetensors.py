"""Writing safetensors files a piece at a time, by one process or by several side by side.

The library's own writer serialises all tensors in memory first, which a checkpoint or an export of a model that barely
fits cannot afford. In the format a tensor is one range of bytes, and some of its rows are a range within it, so that
processes can write one file together, each at its own places; its bytes do not tell how many they were. Reading stays
with the library.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .headers import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
PIECE = 1 << 26  # bytes that one hash covers, and that are copied off a device at once, at most


@dataclass(frozen=True)
class Deferred:
    """A tensor that ``make`` produces when its turn to be written comes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Rows:
    """A tensor of ``shape`` of which some of the writing processes hold the rows: ``holders``, in their order, with the
    bytes of each. ``here`` is what this process holds, None if that is nothing."""

    here: Tensor | None
    dtype: torch.dtype
    shape: tuple[int, ...]
    holders: tuple[tuple[int, int], ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


Entries = Mapping[str, Tensor | Deferred | Rows]
Seal = tuple[int, int, str]  # the bytes of a file from one place on: (place, how many, their SHA-256 in hex)


@dataclass
class _Piece:
    """``bytes`` of a file from ``offset`` on, for process ``owner`` to write and to hash. A part is (a tensor's name,
    "" for the header, and the first byte and the one after the last of what the owner holds of it)."""

    owner: int | None
    offset: int
    bytes: int = 0
    parts: list[tuple[str, int, int]] = field(default_factory=list)


def write_safetensors(path: Path, tensors: Entries, metadata: dict[str, str] | None = None) -> None:
    """Write ``tensors`` in the safetensors format, fsync'd. Raises as :func:`write_share` does."""
    create(path, tensors, metadata)
    write_share(path, tensors, metadata=metadata)


def create(path: Path, tensors: Entries, metadata: dict[str, str] | None = None) -> None:
    """Make the file in its full length, for :func:`write_share` to fill. Raises ``OSError``."""
    with path.open("wb") as file:
        file.truncate(file_bytes(tensors, metadata))


def file_bytes(tensors: Entries, metadata: dict[str, str] | None = None) -> int:
    return sum(value.nbytes for value in _with_header(tensors, metadata).values())


def write_share(
    path: Path, tensors: Entries, rank: int = 0, size: int = 1, metadata: dict[str, str] | None = None
) -> list[Seal]:
    """Write what process ``rank`` of ``size`` has to, of a file that one of them has :func:`create`-d, fsync'd; returns
    the seals of its pieces. All call it with tensors of the same names, dtypes and shapes, in one order: each writes
    its own :class:`Rows`, and an even share of the rest. Prints a line with the part of it written and the rate every
    few seconds when it takes that long.

    Raises ``OSError``; ``KeyError`` for a dtype that safetensors does not have.
    """
    entries = _with_header(tensors, metadata)
    mine = [piece for piece in _cut(entries, size) if piece.owner == rank]
    chunks = zip((piece.offset for piece in mine), _chunks(entries, mine), strict=True)
    return _fill(path, sum(piece.bytes for piece in mine), chunks)


def share_bytes(tensors: Entries, rank: int = 0, size: int = 1) -> int:
    """How many bytes :func:`write_share` writes, and a :class:`Copied` share holds."""
    return sum(piece.bytes for piece in _cut(_with_header(tensors, None), size) if piece.owner == rank)


class Copied:
    """The share of a file that process ``rank`` of ``size`` writes, copied into host memory, so that ``tensors`` may
    change before it is written. It is page-locked where they lie on a GPU, which then copies at full speed."""

    def __init__(self, tensors: Entries, rank: int = 0, size: int = 1) -> None:
        entries = _with_header(tensors, None)
        mine = [piece for piece in _cut(entries, size) if piece.owner == rank]
        self.locked = any(map(_is_on_gpu, entries.values()))
        how = {"dtype": torch.uint8, "device": "cpu", "pin_memory": self.locked}
        # All memory is asked for first: where there is none, nothing was copied in vain.
        self._pieces = [(piece.offset, torch.empty(piece.bytes, **how)) for piece in mine]
        for (_, memory), chunks in zip(self._pieces, _chunks(entries, mine), strict=True):
            start = 0
            for chunk in chunks:
                memory[start : start + chunk.numel()].copy_(chunk, non_blocking=self.locked)
                start += chunk.numel()
        if self.locked:
            torch.cuda.current_stream().synchronize()

    def write(self, path: Path) -> list[Seal]:
        """The same as :func:`write_share`. The memory of a piece is given back when that is written."""
        return _fill(path, sum(memory.numel() for _, memory in self._pieces), self._leaving())

    def _leaving(self) -> Iterator[tuple[int, list[Tensor]]]:
        while self._pieces:
            offset, memory = self._pieces.pop(0)
            yield offset, [memory]


def joined(shares: Iterable[list[Seal]], size: int) -> list[tuple[int, str]]:
    """The seals of all processes as (bytes, SHA-256) in the order of a file of ``size`` bytes, of which none is left
    out."""
    seals, end = sorted(chain.from_iterable(shares)), 0
    for offset, count, _ in seals:
        assert offset == end, f"bytes {end} to {offset} were written twice or by nobody"
        end += count
    assert end == size, f"{end} of {size} bytes were written"
    return [(count, digest) for _, count, digest in seals]


def altered(path: Path, pieces: Iterable[tuple[int, str]], rank: int = 0, size: int = 1) -> tuple[int, int] | None:
    """(first byte, the one after the last) of a piece of the file that is not what :func:`joined` says, of those that
    process ``rank`` of ``size`` looks at; None if there is none. Raises ``OSError``."""
    offset = 0
    with path.open("rb") as file:
        for number, (count, wanted) in enumerate(pieces):
            if number % size == rank:
                file.seek(offset)
                digest, left = hashlib.sha256(), count
                while left and (chunk := file.read(min(left, 1 << 20))):
                    digest.update(chunk)
                    left -= len(chunk)
                if digest.hexdigest() != wanted:
                    return offset, offset + count
            offset += count
    return None


def _with_header(tensors: Entries, metadata: dict[str, str] | None) -> dict[str, Tensor | Deferred | Rows]:
    """``tensors`` after what stands before them in the file, as one more of them."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, value in tensors.items():
        header[name] = {"dtype": _NAMES[value.dtype], "shape": list(value.shape)}
        header[name]["data_offsets"] = [offset, offset + value.nbytes]
        offset += value.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return {"": torch.frombuffer(bytearray(len(text).to_bytes(8, "little") + text), dtype=torch.uint8), **tensors}


def _cut(entries: Entries, size: int) -> list[_Piece]:
    """The pieces of a file, in its order. What only one process has is its; the rest, so cut that each gets some of a
    small file too, goes to whom least of it has gone to."""
    limit = min(PIECE, -(-sum(value.nbytes for value in entries.values()) // size))
    pieces, end = [_Piece(None, 0)], 0
    for name, value in entries.items():
        holders = value.holders if isinstance(value, Rows) else ((None, value.nbytes),)
        assert sum(count for _, count in holders) == value.nbytes, f"some bytes of {name} are held by nobody"
        for owner, count in holders:
            start = 0
            while start < count:
                if pieces[-1].owner != owner or pieces[-1].bytes == limit:
                    pieces.append(_Piece(owner, end))
                piece = pieces[-1]
                stop = min(count, start + limit - piece.bytes)
                piece.parts.append((name, start, stop))
                piece.bytes += stop - start
                start, end = stop, end + stop - start
    load = [0] * size
    for piece in (piece for piece in pieces if piece.owner is None):
        piece.owner = load.index(min(load))
        load[piece.owner] += piece.bytes
    return pieces


def _bytes(name: str, value: Tensor | Deferred | Rows) -> Tensor:
    """What this process holds of a tensor, as uint8."""
    if isinstance(value, Deferred):
        tensor, promised = value.make(), (value.dtype, tuple(value.shape))
        assert (tensor.dtype, tuple(tensor.shape)) == promised, f"{name} is not the {promised} that was promised"
    else:
        tensor = value.here if isinstance(value, Rows) else value
    assert tensor is not None, f"{name} is for another process to write"
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _is_on_gpu(value: Tensor | Deferred | Rows) -> bool:
    here = value.here if isinstance(value, Rows) else value
    return isinstance(here, Tensor) and here.is_cuda


def _chunks(entries: Entries, pieces: Iterable[_Piece]) -> Iterator[Iterator[Tensor]]:
    """For each piece its bytes, in chunks where they are."""
    bytes_of = lru_cache(maxsize=1)(lambda name: _bytes(name, entries[name]))
    for piece in pieces:
        yield (bytes_of(name)[start:stop] for name, start, stop in piece.parts)


def _fill(path: Path, total: int, pieces: Iterable[tuple[int, Iterable[Tensor]]]) -> list[Seal]:
    """Write ``pieces`` of ``total`` bytes, each given as its place and its chunks, fsync'd; returns their seals."""
    progress = _Progress(path, total)
    # Only for writing: a network file system then sends no byte that was not written here.
    with os.fdopen(os.open(path, os.O_WRONLY | getattr(os, "O_BINARY", 0)), "wb") as file:
        seals = [_write(file, offset, chunks, progress) for offset, chunks in pieces]
        file.flush()
        os.fsync(file.fileno())
    return seals


def _write(file: BinaryIO, offset: int, chunks: Iterable[Tensor], progress: "_Progress") -> Seal:
    digest, count = hashlib.sha256(), 0
    file.seek(offset)
    for chunk in chunks:
        data = chunk.cpu().numpy().data
        file.write(data)
        digest.update(data)
        progress.add(len(data))
        count += len(data)
    return offset, count, digest.hexdigest()


class _Progress:
    """Says how far a long write is, every ``INTERVAL`` seconds."""

    INTERVAL = 5.0

    def __init__(self, path: Path, total: int) -> None:
        self.path, self.total, self.done = path, total, 0
        self.started = self.last = time.monotonic()

    def add(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.last >= self.INTERVAL:
            self.last = now
            rate = self.done / (now - self.started) / 1e6
            print(f"writing {self.path}: {self.done / self.total:.0%}, {rate:.0f} MB/s", flush=True)
