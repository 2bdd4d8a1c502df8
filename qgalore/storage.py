"""Writing safetensors files one tensor at a time.

The library's own writer serialises all tensors in memory first, which a checkpoint or an export of a model that barely
fits cannot afford. Reading stays with the library.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_NAMES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.int8: "I8",
    torch.uint8: "U8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Deferred:
    """A tensor that ``make`` produces when its turn to be written comes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor | Deferred], metadata: dict[str, str] | None = None
) -> dict[str, Any]:
    """Write ``tensors`` in the safetensors format, fsync'd; returns ``{"bytes": size, "sha256": hex}`` of the file.
    Prints a line with the share written and the rate every few seconds when it takes that long.

    Raises ``OSError``; ``KeyError`` for a dtype that safetensors does not have.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, value in tensors.items():
        header[name] = {"dtype": _NAMES[value.dtype], "shape": list(value.shape)}
        header[name]["data_offsets"] = [offset, offset + value.nbytes]
        offset += value.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    progress = _Progress(path, 8 + len(text) + offset)
    with path.open("wb") as file:
        for chunk in _chunks(len(text).to_bytes(8, "little") + text, tensors):
            file.write(chunk)
            digest.update(chunk)
            progress.add(len(chunk))
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": 8 + len(text) + offset, "sha256": digest.hexdigest()}


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


def _chunks(head: bytes, tensors: Mapping[str, Tensor | Deferred]) -> Iterator[Any]:
    yield head
    for name, value in tensors.items():
        tensor = value.make() if isinstance(value, Deferred) else value
        promised = (value.dtype, tuple(value.shape))
        assert (tensor.dtype, tuple(tensor.shape)) == promised, f"{name} is not the {promised} that was promised"
        yield tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data
