"""Which files of a folder hold its weights. transformers decides that by name, and so it is here; two files that would
both do must agree."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from ..files.headers import Entry, entries, same
from . import kinds
from .packed import unpacked

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def stored_tensors(
    folder: Path, fields: dict[str, Any], report: Callable[[str], None] = lambda line: None
) -> dict[str, Entry]:
    """The tensors that transformers would read from ``folder``, whose ``config.json`` is ``fields``, by name; those of
    qgalore's int8 export under the names of the weights that they stand for. What is left unread is reported. Raises
    :class:`ConfigError` for damaged or missing files, and where two disagree."""
    try:
        files, index = _files(folder, fields)
        found = _joined(files)
        if index is None and (folder / INDEX).is_file():
            report(_stale(folder, found))
        found = unpacked(found) if kinds.is_int8_export(fields) else found
    except (ConfigError, OSError) as error:
        raise ConfigError(f"model.path {str(folder)!r} cannot be loaded: {error}") from error
    if unread := _unread(folder, files):
        report(f"{len(unread)} files in {folder} hold weights that are not read, for example {unread[0]}")
    _refuse_codes(folder, found)
    return found


def _refuse_codes(folder: Path, found: dict[str, Entry]) -> None:
    """Raise :class:`ConfigError` for tensors that only make sense together with scales, whatever ``config.json`` says
    of them: read as numbers, such integers would be weights of no model."""
    for name, entry in found.items():
        if name.endswith(kinds.OF_QUANTIZATION):
            raise ConfigError(
                f"model.path {str(folder)!r} holds {name}, a part of a quantized weight, and its config.json names no "
                f"quantization that can be read. {kinds.START}"
            )
        if isinstance(entry, Entry) and name.endswith(".weight") and not (entry.dtype or torch.int8).is_floating_point:
            raise ConfigError(
                f"model.path {str(folder)!r}: {name} is stored as {entry.kind}, and a weight must be F32, F16, BF16 or "
                "F64. Such codes are no weights without their scales; a converted model that was not saved by "
                f"qgalore.save has them too. {kinds.START}"
            )


def _files(folder: Path, fields: dict[str, Any]) -> tuple[list[Path], Path | None]:
    """The files that transformers reads, in its order, and the index that names them (None for a single file)."""
    stated = fields.get("transformers_weights")
    if stated is not None:
        path = _inside(folder, stated, "config.json's transformers_weights")
        return (_shards(folder, path), path) if path.name.endswith(".index.json") else ([path], None)
    if (folder / SINGLE).is_file():
        return [folder / SINGLE], None
    if (folder / INDEX).is_file():
        return _shards(folder, folder / INDEX), folder / INDEX
    raise ConfigError(_nothing(folder))


def _nothing(folder: Path) -> str:
    """Why a folder without ``SINGLE`` and ``INDEX`` has no weights."""
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    if any("-of-" in name for name in others):
        return f"its shards ({others[0]}, …) have no {INDEX}, which says which of them belong together. Copy it too"
    if variants := [name for name in others if name.startswith("model.")]:
        return (
            f"it has no {SINGLE}, only {variants[0]}, a variant that transformers does not read unless it is asked for "
            f"by name. Rename it to {SINGLE} if that is the one you mean"
        )
    if others:
        return (
            f"it has no {SINGLE} or {INDEX}, and transformers does not read {others[0]}. Rename it if it is the model"
        )
    if pickles:
        return (
            f"it has no .safetensors file; {pickles[0]} is a pickle, which can run any program when read: convert it "
            "once, in a place you trust, with transformers' save_pretrained"
        )
    if kinds.has(folder, "*.gguf"):
        return "it holds a GGUF model, which cannot be trained. Start from the folder that it was made from"
    return "it has no .safetensors file. Copy the weights into it"


def _inside(folder: Path, name: Any, what: str) -> Path:
    """The file ``name`` of ``folder``. Raises :class:`ConfigError` for one that leads out of it, or that is not
    read."""
    if not isinstance(name, str) or not name or Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
        raise ConfigError(f"{what} names {name!r}, which is no file in this folder")
    if not name.endswith((".safetensors", ".safetensors.index.json")):
        raise ConfigError(f"{what} names {name}, and only .safetensors files are read")
    if not (folder / name).is_file():
        raise ConfigError(f"the shard {name} is missing: {what} names it. Copy it into the folder")
    return folder / name


def _weight_map(index: Path) -> dict[str, str]:
    listed = kinds.read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ConfigError(f"{index.name} has no weight_map, the table of tensors and files. Copy it again")
    return listed


def _shards(folder: Path, index: Path) -> list[Path]:
    """The files that an index names; which of its tensors lies in which of them does not matter to transformers."""
    names = _weight_map(index).values()
    if odd := [name for name in names if not isinstance(name, str)]:
        raise ConfigError(f"{index.name} names {odd[0]!r}, which is no file")
    return [_inside(folder, name, index.name) for name in sorted(set(names))]


def _joined(files: list[Path]) -> dict[str, Entry]:
    """The tensors of all files. Raises :class:`ConfigError` where two hold one name with different values."""
    found: dict[str, Entry] = {}
    for path in files:
        for name, entry in entries(path).items():
            if name in found and not same(found[name], entry):
                raise ConfigError(
                    f"{name} has other values in {path.name} than in {found[name].path.name}. Remove the wrong file"
                )
            found[name] = entry
    return found


def _stale(folder: Path, found: dict[str, Entry]) -> str:
    """A line about an index beside a single file, which transformers reads alone. Raises :class:`ConfigError` if the
    files of the index are there and hold anything else."""
    listed = _weight_map(folder / INDEX)
    names = sorted({name for name in listed.values() if isinstance(name, str)})
    if names == [SINGLE]:
        return f"{SINGLE} is read; the {INDEX} beside it is not needed"
    if any(not (folder / name).is_file() for name in names):
        return f"{SINGLE} is read, as transformers does; the {INDEX} beside it names files that are not there"
    others = _joined([_inside(folder, name, INDEX) for name in names])
    differing = [n for n in {**found, **others} if n not in found or n not in others or not same(found[n], others[n])]
    if differing:
        raise ConfigError(
            f"{SINGLE} and the files of {INDEX} hold different weights, for example {differing[0]}. "
            "Remove those that are not meant"
        )
    return f"{SINGLE} is read; the files of {INDEX} hold the same"


def _unread(folder: Path, files: list[Path]) -> list[str]:
    others = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
    return sorted(path.name for path in others if path not in files)
