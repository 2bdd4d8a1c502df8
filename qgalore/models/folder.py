"""Reading a Hugging Face folder's safetensors files a few rows at a time, by plain reads: a memory-mapped file would
count as memory of this process page by page."""

import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .streaming import CannotStreamError, Rows, as_matrix

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Where a mixture's experts lie in files that keep them apart: Mixtral's kind, and Qwen's, which most others follow
_EXPERTS = {
    ".block_sparse_moe.": {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)},
    ".mlp.": {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)},
}
_MAX_HEADER = 100_000_000  # as the safetensors library


@dataclass(frozen=True)
class _Entry:
    """Where a tensor lies: ``begin`` counts from the start of ``path``."""

    path: Path
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    begin: int

    def rows(self, a: int, b: int) -> Tensor:
        """Rows a … b−1, in the file's dtype, as :data:`.streaming.Rows` counts them."""
        width = as_matrix(self.shape)[1:].numel()
        with self.path.open("rb") as file:
            file.seek(self.begin + a * width * self.dtype.itemsize)
            raw = bytearray(file.read((b - a) * width * self.dtype.itemsize))
        if len(raw) < (b - a) * width * self.dtype.itemsize:
            raise ConfigError(f"{self.path} ends inside a tensor: it is damaged or was not copied whole")
        return torch.frombuffer(raw, dtype=self.dtype).view((b - a, *as_matrix(self.shape)[1:]) if self.shape else ())


@dataclass(frozen=True)
class _Stack:
    """Matrices of one width, one below the other, that make up a tensor of ``shape``."""

    parts: list[_Entry]
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype | None:
        """That of all, if they agree."""
        kinds = {part.dtype for part in self.parts}
        return kinds.pop() if len(kinds) == 1 else None

    def rows(self, a: int, b: int) -> Tensor:
        """Rows a … b−1 of them all."""
        found, first = [], 0
        for part in self.parts:
            low, high = max(a - first, 0), min(b - first, part.shape[0])
            if low < high:
                found.append(part.rows(low, high))
            first += part.shape[0]
        return torch.cat(found)


def _header(path: Path) -> dict[str, _Entry]:
    """The tensors of one safetensors file. Raises :class:`ConfigError` for a file that is not one."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, _MAX_HEADER):
            raise ConfigError(f"{path} is not a safetensors file, or is damaged")
        try:
            entries = json.loads(file.read(length))
            entries.pop("__metadata__", None)
            found = {
                name: (_DTYPES.get(e["dtype"]), tuple(e["shape"]), e["data_offsets"]) for name, e in entries.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} is not a safetensors file, or is damaged: {error}") from error
    if any(8 + length + offsets[1] > size for *_, offsets in found.values()):
        raise ConfigError(f"{path} is shorter than its header says: it is damaged or was not copied whole")
    return {n: _Entry(path, dtype, shape, 8 + length + offsets[0]) for n, (dtype, shape, offsets) in found.items()}


def _entries(folder: Path) -> dict[str, _Entry]:
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        hint = (
            f"; {pickles[0]} is a pickle, which can run any program when read: convert it once, in a place you trust, "
            "with transformers' save_pretrained"
            if pickles
            else ""
        )
        raise ConfigError(f"model.path {str(folder)!r} cannot be loaded: it has no .safetensors file{hint}")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            listed = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise ConfigError(f"model.path {str(folder)!r} cannot be loaded: {index.name}: {error}") from error
        if absent := sorted(name for name in listed if not (folder / name).is_file()):
            raise ConfigError(f"model.path {str(folder)!r} cannot be loaded: the shard {absent[0]} is missing")
        files = [folder / name for name in sorted(listed)]
    found: dict[str, _Entry] = {}
    try:
        for path in files:
            found |= _header(path)
    except (ConfigError, OSError) as error:
        raise ConfigError(f"model.path {str(folder)!r} cannot be loaded: {error}") from error
    return found


def _experts(entries: dict[str, _Entry], name: str, shape: tuple[int, ...]) -> _Stack | None:
    """The stacked tensor ``name`` (E, out, in) from one file tensor for each expert, as most folders have them, and
    transformers writes them; None if they are not there, or do not add up to ``shape``."""
    module, _, key = name.rpartition(".")
    for place, of_key in _EXPERTS.items():
        parts = [
            entries.get(f"{module.replace('.mlp.', place)}.{expert}.{part}.weight")
            for expert in range(shape[0])
            for part in of_key.get(key, ())
        ]
        heights = sum(part.shape[0] for part in parts if part is not None)
        if parts and None not in parts and all(part.shape[1:] == shape[2:] for part in parts):
            return _Stack(parts, (shape[0], heights // shape[0], shape[2]))
    return None


def stored(
    folder: Path, model: nn.Module, report: Callable[[str], None], optional: Collection[str] = ()
) -> Iterator[tuple[str, Rows]]:
    """A source of ``model``'s parameters (see :mod:`.streaming`) from the files in ``folder``.

    Names may differ by the base model's prefix; tensors without use are reported. Parameters in ``optional`` are left
    out where the files have none that fits. Raises :class:`ConfigError` for
    damaged files and mismatched shapes, and :class:`CannotStreamError` if some parameter has no tensor under its own
    name: transformers may know another.
    """
    entries = _entries(folder)
    prefix = f"{model.base_model_prefix}."
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    chosen: list[tuple[str, _Entry | _Stack]] = []
    for name, parameter in model.named_parameters():
        tries = [t for n in aliases[id(parameter)] for t in (n, n.removeprefix(prefix), prefix + n)]
        tries += [t.replace(".mlp.gate.", ".block_sparse_moe.gate.") for t in tries]  # a mixture's router
        entry = next((entries[t] for t in tries if t in entries), None)
        if entry is None and parameter.ndim == 3:
            found = (_experts(entries, t, tuple(parameter.shape)) for t in tries)
            entry = next((stack for stack in found if stack is not None), None)
        if name in optional and (entry is None or entry.shape != tuple(parameter.shape)):
            continue
        if entry is None:
            raise CannotStreamError(f"{folder} has no tensor named {name}")
        if entry.shape != tuple(parameter.shape):
            raise ConfigError(
                f"model.path {str(folder)!r}: {name} is {entry.shape} in the files and {tuple(parameter.shape)} in "
                "config.json: mismatched keys. The folder belongs to another architecture"
            )
        if entry.dtype is None:
            raise CannotStreamError(f"{name} is not stored in (one kind of) floating point")
        chosen.append((name, entry))
    used = {id(part) for _, entry in chosen for part in (entry.parts if isinstance(entry, _Stack) else [entry])}
    known = {t for names in aliases.values() for n in names for t in (n, n.removeprefix(prefix), prefix + n)}
    unused = [n for n, e in entries.items() if id(e) not in used and n not in known and not n.endswith("inv_freq")]
    if unused:
        report(f"{len(unused)} tensors in {folder} have no place in the model and are left, for example {unused[0]}")
    return ((name, entry.rows) for name, entry in chosen)
