"""Checkpoints: two safetensors files and one JSON in a folder that appears whole or not at all.

``model.safetensors``: the model's state dict. ``optimizer.safetensors``: inner states and fp32 masters, named
``slot|kind|name``. ``state.json``: schedules, scalars, positions, the resolved configuration, the sizes of both files,
the SHA-256 of each piece of them, and of itself. Tensors are written and read a piece at a time, so no second copy of
the model exists. The processes of a job write into the same two files, which are those that one process would write.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .errors import ConfigError
from .lowrank.layers.linear import LowRankLinear
from .parallel import ALONE, Team, shards
from .storage import Entries, Rows, Seal, altered, create, file_bytes, joined, write_share

VERSION = 3
PREFIX = "step-"
_FILES = ("model.safetensors", "optimizer.safetensors")


class DamagedError(ConfigError):
    """A checkpoint that is incomplete, altered, or of another version."""


def _flatten(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimizer's state dict into tensors and what JSON can hold."""
    tensors: dict[str, Tensor] = {}
    rest = {"step_count": state["step_count"], "groups": state["groups"], "slots": {}}
    for slot, parts in state["slots"].items():
        scalars: dict[str, Any] = {"inner": {}, "extra": {}}
        for kind in ("inner", "extra"):
            for name, value in parts[kind].items():
                if torch.is_tensor(value):
                    tensors[f"{slot}|{kind}|{name}"] = value
                else:
                    scalars[kind][name] = value
        rest["slots"][slot] = {**scalars, **{k: v for k, v in parts.items() if k not in ("inner", "extra")}}
    return tensors, rest


def _unflatten(tensors: Iterator[tuple[str, Tensor]], rest: dict[str, Any]) -> dict[str, Any]:
    state = {**rest, "slots": {slot: {**parts} for slot, parts in rest["slots"].items()}}
    for key, value in tensors:
        slot, kind, name = key.rsplit("|", 2)
        state["slots"][slot][kind][name] = value
    return state


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share no memory: tied weights keep the first of their names."""
    seen: set[int] = set()
    kept = {}
    for name, value in tensors.items():
        place = shards.local(value).data_ptr()
        if value.numel() and place in seen:
            continue
        seen.add(place)
        kept[name] = value.detach()
    return kept


def _needed_bytes(tensors: Entries) -> int:
    return file_bytes(tensors) + 256 * len(tensors)  # for what state.json says of them


def _seal(document: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _sync_folder(path: Path) -> None:
    if os.name == "nt":  # Windows opens no folders; its renames are journalled
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    """Delete a checkpoint so that no moment shows half of it under its own name."""
    doomed = folder.with_name(f".{folder.name}.deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _contents(model: nn.Module, optimizer_state: dict[str, Any]) -> tuple[dict[str, Entries], dict[str, Any]]:
    """The tensors of each file, and the rest."""
    tensors, rest = _flatten(optimizer_state)
    files = dict(zip(_FILES, (_unshared(model.state_dict()), tensors), strict=True))
    return {name: {key: _rows(value) for key, value in held.items()} for name, held in files.items()}, rest


def _rows(tensor: Tensor) -> Tensor | Rows:
    return Rows(shards.local(tensor), tuple(tensor.shape)) if shards.is_shared(tensor) else tensor


def save(
    folder: Path, model: nn.Module, optimizer_state: dict[str, Any], run_state: dict[str, Any], team: Team = ALONE
) -> Path:
    """Write ``folder`` (…/step-00000100), in every process of ``team`` its share: into a hidden sibling, fsync'd, which
    rank 0 makes before and renames after. On every process raises :class:`ConfigError` on an I/O error in one, if the
    disk is too full or not the same for all, naming the folder; the other checkpoints stay as they are.

    A complete checkpoint already there is left: the state after a step does not depend on how often it is reached.
    """
    contents, rest = _contents(model, optimizer_state)
    mine = folder.with_name(
        f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp"
    )  # rank 0's is everyone's, and new on every disk
    try:
        with team.together("the end of a checkpoint"), _explained(folder):
            building = team.of_first("the beginning of a checkpoint", partial(_begin, folder, mine, contents))
            if building is None:
                return folder
            if not building.is_dir():
                raise OSError(f"{building}, which rank 0 made, is not there; all processes must see one disk")
            shares = {name: write_share(building / name, c, team.rank, team.size) for name, c in contents.items()}
            shares = team.gather("what was written of a checkpoint", shares)
            if team.leads:
                files = {name: _sealed(building / name, [share[name] for share in shares]) for name in contents}
                _finish(folder, building, {"version": VERSION, **run_state, "optimizer": rest, "files": files})
    except Exception:
        shutil.rmtree(mine, ignore_errors=True)
        raise
    return folder


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"the checkpoint {folder} could not be written: {error}. Older checkpoints are intact; free space or set "
            "another run.dir, then continue with --resume auto"
        ) from error


def _begin(folder: Path, building: Path, contents: dict[str, Entries]) -> Path | None:
    """Make ``building``, with files in their full length, and return it; None if a complete checkpoint is there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        if newest_of([folder])[0]:
            return None
        _remove(folder)
    for leftover in folder.parent.glob(".*"):
        shutil.rmtree(leftover, ignore_errors=True)
    needed, free = sum(map(_needed_bytes, contents.values())), shutil.disk_usage(folder.parent).free
    if needed > free:
        raise OSError(f"it needs {needed / 2**20:,.1f} MiB and the disk has {free / 2**20:,.1f} MiB free")
    building.mkdir()
    for name, tensors in contents.items():
        create(building / name, tensors)
    return building


def _sealed(path: Path, shares: list[list[Seal]]) -> dict[str, Any]:
    size = path.stat().st_size
    return {"bytes": size, "pieces": joined(shares, size)}


def _finish(folder: Path, building: Path, document: dict[str, Any]) -> None:
    with (building / "state.json").open("w", encoding="utf-8") as file:
        json.dump({**document, "sha256": _seal(document)}, file)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(building)
    building.rename(folder)
    _sync_folder(folder.parent)


def steps_in(folder: Path) -> list[Path]:
    """The checkpoints under ``folder``, oldest first; they may yet be damaged (see :func:`read_state`)."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if path.is_dir() and path.name[len(PREFIX) :].isdigit())


def name_for(step: int) -> str:
    return f"{PREFIX}{step:08d}"


def set_aside(folder: Path, step: int) -> list[Path]:
    """Rename checkpoints of steps after ``step`` to ``left-step-…`` and return their new paths: a run that goes on from
    ``step`` takes another course, and neither --resume auto nor pruning may mix the two."""
    moved = []
    for path in steps_in(folder):
        if int(path.name.removeprefix(PREFIX)) > step:
            target = folder / f"left-{path.name}"
            shutil.rmtree(target, ignore_errors=True)
            moved.append(path.rename(target))
    return moved


def prune(folder: Path, keep_last: int, keep_every: int | None = None, keep_step: int | None = None) -> None:
    """Delete all checkpoints under ``folder`` but the newest ``keep_last``, those of steps that are multiples of
    ``keep_every`` and that of ``keep_step``. Raises :class:`ConfigError` if it cannot."""
    for old in steps_in(folder)[:-keep_last]:
        step = int(old.name.removeprefix(PREFIX))
        if step == keep_step or (keep_every and step % keep_every == 0):
            continue
        try:
            _remove(old)
        except OSError as error:
            raise ConfigError(f"the old checkpoint {old} could not be deleted: {error}; delete it by hand") from error


def read_state(folder: Path, team: Team = ALONE) -> dict[str, Any]:
    """``state.json`` of a checkpoint whose every byte is as it was written: each process of ``team`` looks at some of
    them. Raises :class:`DamagedError` otherwise, on every process."""
    state, problem = {}, None
    try:
        state = _document(folder)
        for name in _FILES:
            _verify(folder / name, state["files"][name], team)
    except DamagedError as error:
        problem = error
    found = team.gather(f"the bytes of {folder.name}", None if problem is None else str(problem))
    if first := next(filter(None, found), None):
        raise DamagedError(first) from problem
    return state


def _document(folder: Path) -> dict[str, Any]:
    """``state.json``, which is its own witness."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(f"{folder} is not a complete checkpoint: {error}") from error
    version = state.get("version") if isinstance(state, dict) else None
    if version != VERSION:
        raise DamagedError(f"{folder} has checkpoint version {version!r}; this program reads version {VERSION}")
    if state.pop("sha256", None) != _seal(state):
        raise DamagedError(f"{folder / 'state.json'} was altered: its SHA-256 does not match")
    return state


def _verify(path: Path, wanted: dict[str, Any], team: Team) -> None:
    """This process's part of the file."""
    try:
        size = path.stat().st_size
        if size != wanted["bytes"]:
            raise DamagedError(f"{path} has {size:,} bytes instead of {wanted['bytes']:,}")
        place = altered(path, wanted["pieces"], team.rank, team.size)
    except OSError as error:
        raise DamagedError(f"{path} cannot be read: {error}") from error
    if place is not None:
        raise DamagedError(f"{path} was altered: the SHA-256 of bytes {place[0]:,} to {place[1]:,} does not match")


def newest_of(folders: list[Path], team: Team = ALONE) -> tuple[Path | None, dict[str, Any] | None, list[str]]:
    """The last undamaged checkpoint of ``folders`` with its state (None, None if there is none), and what is wrong
    with each one after it. All processes of ``team`` ask for the same ones and get the same answer."""
    complaints = []
    for path in reversed(folders):
        try:
            return path, read_state(path, team), complaints
        except DamagedError as error:
            complaints.append(str(error))
    return None, None, complaints


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - safe_open is not a mapping
            yield name, file.get_tensor(name).clone()  # the library's own may be backed by the file


def load_into(folder: Path, state: dict[str, Any], model: nn.Module, optimizer) -> None:
    """Fill ``model`` and ``optimizer`` (a LowRankOptimizer) from a checkpoint whose ``state`` :func:`read_state` gave.

    Raises :class:`ConfigError` if the tensors are those of another model.
    """
    load_model(folder, model)
    try:
        optimizer.load_state_dict(_unflatten(_tensors(folder / "optimizer.safetensors"), state["optimizer"]))
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise ConfigError(f"checkpoint {folder} cannot be used: {error}") from error


def _fit_ranks(model: nn.Module, files: list[Path]) -> None:
    """Give the layers of ``model`` whose rank is free to move the ranks that ``files`` have."""
    shapes = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear):
            module.fit(shapes, f"{name}.")


def load_model(folder: Path, model: nn.Module) -> None:
    """Fill ``model`` alone from ``model.safetensors`` or its shards; of tied tensors one name is enough. Raises
    :class:`ConfigError` if the tensors are those of another model."""
    try:
        files = sorted(folder.glob("model*.safetensors"))
        if not files:
            raise OSError("it has no model.safetensors")
        _fit_ranks(model, files)
        own = model.state_dict()
        loaded = set()
        for name, value in (item for path in files for item in _tensors(path)):
            if name not in own:
                raise ValueError(f"the model has no tensor {name}")
            if own[name].shape != value.shape or own[name].dtype != value.dtype:
                raise ValueError(
                    f"{name} is {tuple(value.shape)} {value.dtype} in the checkpoint and {tuple(own[name].shape)} "
                    f"{own[name].dtype} in the model"
                )
            here = shards.local(own[name])
            with torch.no_grad():
                here.copy_(shards.rows_of(own[name], value))
            loaded.add(here.data_ptr())
        if absent := [n for n, value in own.items() if value.numel() and shards.local(value).data_ptr() not in loaded]:
            raise ValueError(f"the checkpoint has no tensor {min(absent)}")
    except (OSError, SafetensorError, ValueError) as error:
        raise ConfigError(f"checkpoint {folder} cannot be used: {error}") from error
