"""Reading safetensors files a few rows at a time.

The safetensors library checks every header: what it refuses is refused here, in its words. The bytes are then read by
plain reads, since a memory-mapped file would count as memory of this process page by page.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import ConfigError

# What this program can read; the library knows more, of which the names alone are kept.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
TILE_ELEMENTS = 1 << 22  # of a tensor that is looked through


def as_matrix(shape: tuple[int, ...]) -> torch.Size:
    """``shape``, with all dimensions but the last made one where there are more than two."""
    shape = torch.Size(shape)
    return shape if len(shape) < 3 else torch.Size((shape[:-1].numel(), shape[-1]))


@dataclass(frozen=True)
class Entry:
    """One stored tensor: ``begin`` counts bytes from the start of ``path``, and ``kind`` names its type in the file."""

    path: Path
    kind: str
    shape: tuple[int, ...]
    begin: int

    @property
    def dtype(self) -> torch.dtype | None:
        return DTYPES.get(self.kind)

    def rows(self, a: int, b: int) -> Tensor:
        """Rows a … b−1 of the tensor :func:`as_matrix`, in the file's dtype; all of it for a scalar. Raises
        :class:`ConfigError` if the file ends before them."""
        dtype = self.dtype
        if dtype is None:
            raise ConfigError(f"{self.path} holds values of type {self.kind}; use one of {', '.join(DTYPES)}")
        shape = as_matrix(self.shape)
        width = shape[1:].numel() * dtype.itemsize
        count = (b - a) * width if self.shape else width
        with self.path.open("rb") as file:
            file.seek(self.begin + a * width)
            raw = bytearray(file.read(count))
        if len(raw) < count:
            raise ConfigError(f"{self.path} ends inside a tensor: it is damaged or was not copied whole")
        values = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype, device="cpu")
        return values.view((b - a, *shape[1:]) if self.shape else ())

    def tiles(self) -> Iterator[tuple[int, int]]:
        """Row ranges of at most about ``TILE_ELEMENTS`` values."""
        shape = as_matrix(self.shape)
        rows = shape[0] if shape else 1
        step = max(1, TILE_ELEMENTS // max(1, shape[1:].numel()))
        return ((start, min(start + step, rows)) for start in range(0, rows, step))


def entries(path: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file, by name. Raises :class:`ConfigError` for a file that the safetensors library
    refuses: offsets that overlap, leave gaps or are no numbers, shapes that do not fit their bytes, surplus bytes."""
    if not path.is_file():
        raise ConfigError(f"{path.name} is missing: {path} is no file. Copy the folder again, whole")
    try:
        with safe_open(path, framework="np"):  # which needs no memory for the file, however large it is
            pass  # opening it checks the header
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(f"{path} is not a safetensors file, or is damaged ({error}). Copy it again") from error
    header.pop("__metadata__", None)
    return {
        name: Entry(path, value["dtype"], tuple(value["shape"]), 8 + length + value["data_offsets"][0])
        for name, value in header.items()
    }


def same(one: Entry, other: Entry) -> bool:
    """Whether two stored tensors hold the same values, whatever their types are. What was found is remembered for as
    long as neither file changes."""
    if one == other:
        return True
    stamps = tuple((stat.st_size, stat.st_mtime_ns) for stat in (one.path.stat(), other.path.stat()))
    return one.shape == other.shape and _compared(one, other, stamps)


@lru_cache(maxsize=256)
def _compared(one: Entry, other: Entry, stamps: tuple) -> bool:
    del stamps  # part of the key alone
    return all(torch.equal(one.rows(a, b).double(), other.rows(a, b).double()) for a, b in one.tiles())


def is_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite; true for integers."""
    return not values.is_floating_point() or bool(torch.isfinite(values).all())
