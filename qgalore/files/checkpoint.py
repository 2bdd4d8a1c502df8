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
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import ConfigError
from ..parallel import ALONE, Team, shards
from ..parallel.kept import Kept
from .atomic import sync_folder
from .checkpoint_folder import (
    FILES,
    STATE,
    clear_leftovers,
    fresh_sibling,
    move_aside,
    name_for,
    number_of,
    remove,
    set_aside,
    step_of,
    steps_in,
)
from .filling import KINDS, flatten, load_into, load_model
from .safetensors import Entries, Rows, Seal, altered, create, file_bytes, joined, write_share

__all__ = [
    "STATE", "DamagedError", "NewerError", "load_into", "load_model", "name_for", "newest_in", "newest_of", "prune",
    "read_state", "save", "set_aside", "step_of", "steps_in",
]  # fmt: skip
VERSION = 3


class DamagedError(ConfigError):
    """A checkpoint that cannot be used: incomplete, altered, or of another version."""


class NewerError(DamagedError):
    """A checkpoint that a later version of this program wrote."""


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


def _contents(model: nn.Module, optimizer_state: dict[str, Any]) -> tuple[dict[str, Entries], dict[str, Any]]:
    """The tensors of each file, and the rest. States that were read come in another order, so those are sorted."""
    tensors, rest = flatten(optimizer_state)
    files = dict(zip(FILES, (_unshared(model.state_dict()), dict(sorted(tensors.items()))), strict=True))
    return {name: {key: _rows(value) for key, value in held.items()} for name, held in files.items()}, rest


def _rows(tensor: Tensor | Kept) -> Tensor | Rows:
    """``tensor`` with what is known of who writes it."""
    if isinstance(tensor, Kept):
        return Rows(tensor.here, tensor.dtype, tensor.shape, ((tensor.owner, tensor.nbytes),))
    if not shards.is_shared(tensor):
        return tensor
    return Rows(shards.local(tensor), tensor.dtype, tuple(tensor.shape), shards.first_holders(tensor))


def save(
    folder: Path, model: nn.Module, optimizer_state: dict[str, Any], run_state: dict[str, Any], team: Team = ALONE
) -> Path:
    """Write ``folder`` (…/step-00000100), in every process of ``team`` its share: into a hidden sibling, fsync'd, which
    rank 0 makes before and renames after. On every process raises :class:`ConfigError` on an I/O error in one, if the
    disk is too full or not the same for all, naming the folder; the other checkpoints stay as they are.

    A complete checkpoint of the same position already there is left: the state after a step does not depend on how
    often it is reached. Anything else of that name is renamed to ``left-…``.
    """
    contents, rest = _contents(model, optimizer_state)
    mine = fresh_sibling(folder, "tmp")  # rank 0's is everyone's, and new on every disk
    try:
        with team.together("the end of a checkpoint"), _explained(folder):
            position = run_state.get("position")
            building = team.of_first("the beginning of a checkpoint", partial(_begin, folder, mine, contents, position))
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


def _begin(folder: Path, building: Path, contents: dict[str, Entries], position: dict[str, Any] | None) -> Path | None:
    """Make ``building``, with files in their full length, and return it; None if that checkpoint is there already."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(folder):
        _, there, _ = newest_of([folder])
        if there is not None and there.get("position") == json.loads(json.dumps(position)):
            return None
        print(f"note: what stands under the name {folder} is kept as {move_aside(folder)}", flush=True)
    clear_leftovers(folder.parent)
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
    with (building / STATE).open("w", encoding="utf-8") as file:
        json.dump({**document, "sha256": _seal(document)}, file)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(building)
    building.rename(folder)
    sync_folder(folder.parent)


def prune(
    newest: Path, keep_last: int, keep_every: int | None = None, keep_steps: Iterable[int] = (), team: Team = ALONE
) -> None:
    """Delete the checkpoints beside ``newest`` that are older, but for the ``keep_last`` newest, itself included, those
    of steps that are multiples of ``keep_every`` and those of ``keep_steps``. Called in every process of ``team``.

    Before anything is deleted, ``newest`` is read again and held against its seals. Later checkpoints are of another
    course: they neither count nor go. Raises :class:`ConfigError` if it was not written as it should be, or on I/O.
    """
    doomed = team.of_first("the old checkpoints", partial(_too_old, newest, keep_last, keep_every, set(keep_steps)))
    if not doomed:
        return
    try:
        read_state(newest, team)
    except DamagedError as error:
        raise ConfigError(
            f"{newest} was written and does not read back as it was: {error}. Older checkpoints are kept. Check the "
            "disk, then go on with --resume auto"
        ) from error
    for old in doomed if team.leads else ():
        try:
            remove(old)
        except OSError as error:
            raise ConfigError(f"the old checkpoint {old} could not be deleted: {error}; delete it by hand") from error


def _too_old(newest: Path, keep_last: int, keep_every: int | None, keep_steps: set[int]) -> list[Path]:
    older = [path for path in steps_in(newest.parent) if number_of(path) < number_of(newest)]
    older = older[: max(0, len(older) + 1 - keep_last)]
    steps = {path: number_of(path) for path in older}
    return [
        path for path, step in steps.items() if step not in keep_steps and not (keep_every and step % keep_every == 0)
    ]


def read_state(folder: Path, team: Team = ALONE) -> dict[str, Any]:
    """``state.json`` of a checkpoint whose every byte is as it was written: each process of ``team`` looks at some of
    them. Raises :class:`DamagedError` otherwise, on every process."""
    state, problem = {}, None
    try:
        state = _document(folder)
        for name in FILES:
            _verify(folder / name, state["files"][name], team)
    except DamagedError as error:
        problem = type(error), str(error)
    found = team.gather(f"the bytes of {folder.name}", problem)
    if first := next(filter(None, found), None):
        kind, message = first
        raise kind(message)
    return state


def _document(folder: Path) -> dict[str, Any]:
    """``state.json``, which is its own witness."""
    if not folder.is_dir():
        raise DamagedError(f"{folder} is not a complete checkpoint: it is no folder; give RUN/checkpoints/step-…")
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(f"{folder} is not a complete checkpoint: {error}") from error
    version = state.get("version") if isinstance(state, dict) else None
    if type(version) is int and version > VERSION:
        raise NewerError(
            f"{folder} was written by a newer qgalore: its version is {version}, and this program reads {VERSION}; "
            "update qgalore"
        )
    if version != VERSION:
        raise DamagedError(f"{folder} has checkpoint version {version!r}; this program reads version {VERSION}")
    if state.pop("sha256", None) != _seal(state):
        raise DamagedError(f"{folder / STATE} was altered: its SHA-256 does not match")
    if not _has_its_parts(state):
        raise DamagedError(f"{folder / STATE} was not written by this program: a part is missing or of another kind")
    return state


def _has_its_parts(state: dict[str, Any]) -> bool:
    """Whether what every reader relies on is of the right kind: the files with seals of all their bytes, the optimizer,
    the position and, where there is one, the configuration."""
    optimizer, files = state.get("optimizer"), state.get("files")
    return (
        isinstance(optimizer, dict)
        and {"step_count", "groups", "slots"} <= optimizer.keys()
        and isinstance(optimizer["slots"], dict)
        and all(isinstance(slot, dict) for slot in optimizer["slots"].values())
        and all(isinstance(slot.get(kind), dict) for slot in optimizer["slots"].values() for kind in KINDS)
        and isinstance(files, dict)
        and all(name in files and _is_seal(files[name]) for name in FILES)
        and all(isinstance(state.get(key, {}), dict) for key in ("position", "config", "model_config"))
    )


def _is_seal(file: Any) -> bool:
    if not isinstance(file, dict) or type(file.get("bytes")) is not int:
        return False
    pieces = file.get("pieces")
    if pieces is None:
        return isinstance(file.get("sha256"), str)
    pairs = isinstance(pieces, list) and all(isinstance(piece, list) and len(piece) == 2 for piece in pieces)
    counted = pairs and all(type(count) is int and count >= 0 for count, _ in pieces)
    return counted and sum(count for count, _ in pieces) == file["bytes"]


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


def newest_of(folders: list[Path], team: Team = ALONE) -> tuple[Path | None, dict[str, Any] | None, list[DamagedError]]:
    """The last usable checkpoint of ``folders`` with its state (None, None if there is none), and what is wrong with
    each one after it. All processes of ``team`` ask for the same ones and get the same answer."""
    complaints = []
    for path in reversed(folders):
        try:
            return path, read_state(path, team), complaints
        except DamagedError as error:
            complaints.append(error)
    return None, None, complaints


def newest_in(run: Path) -> Path:
    """The newest usable checkpoint of the run in folder ``run``, for what reads a run from outside; later ones that
    cannot be used are named. Raises :class:`ConfigError` if there is none."""
    there = steps_in(run / "checkpoints")
    found, _, complaints = newest_of(there)
    for complaint in complaints if found is not None else ():
        print(f"note: an unusable checkpoint is passed over: {complaint}", flush=True)
    if found is None:
        why = "".join(f"\n  {complaint}" for complaint in complaints) or " it has saved none yet"
        raise ConfigError(f"{run / 'checkpoints'} holds no usable checkpoint (step-00000100 or the like):{why}")
    return found
