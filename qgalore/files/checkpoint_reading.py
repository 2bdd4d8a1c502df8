"""Reading checkpoints: ``state.json`` is its own witness, and it vouches for every piece of the other two files."""

import hashlib
import json
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..parallel import ALONE, Team
from .checkpoint_folder import FILES, STATE, steps_in
from .filling import KINDS
from .safetensors import altered

VERSION = 3


class DamagedError(ConfigError):
    """A checkpoint that cannot be used: incomplete, altered, or of another version."""


class NewerError(DamagedError):
    """A checkpoint that a later version of this program wrote."""


def seal_of(document: dict[str, Any]) -> str:
    """The SHA-256, in hex, of what ``state.json`` says beside it."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def read_state(folder: Path, team: Team = ALONE) -> dict[str, Any]:
    """``state.json`` of a checkpoint whose every byte is as it was written: each process of ``team`` looks at some of
    them. Raises :class:`DamagedError` otherwise, on every process."""
    state, problem = examine(folder, team.rank, team.size)
    found = team.gather(f"the bytes of {folder.name}", problem)
    if first := next(filter(None, found), None):
        kind, message = first
        raise kind(message)
    return state


def examine(folder: Path, rank: int = 0, size: int = 1) -> tuple[dict[str, Any], tuple[type[DamagedError], str] | None]:
    """``state.json`` of a checkpoint, and what is wrong with it or with the bytes that process ``rank`` of ``size``
    looks at: the kind of error and its message."""
    state: dict[str, Any] = {}
    try:
        state = _document(folder)
        for name in FILES:
            _verify(folder / name, state["files"][name], rank, size)
    except DamagedError as error:
        return state, (type(error), str(error))
    return state, None


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
    if state.pop("sha256", None) != seal_of(state):
        raise DamagedError(f"{folder / STATE} was altered: its SHA-256 does not match")
    if not _has_its_parts(state):
        raise DamagedError(f"{folder / STATE} was not written by this program: a part is missing or of another kind")
    return state


def _has_its_parts(state: dict[str, Any]) -> bool:
    """Whether what every reader relies on is of the right kind."""
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
    if not isinstance(pieces, list) or not all(isinstance(piece, list) and len(piece) == 2 for piece in pieces):
        return False
    counts = [count for count, _ in pieces]
    return all(type(count) is int and count >= 0 for count in counts) and sum(counts) == file["bytes"]


def _verify(path: Path, wanted: dict[str, Any], rank: int, size: int) -> None:
    """This process's part of the file."""
    try:
        length = path.stat().st_size
        if length != wanted["bytes"]:
            raise DamagedError(f"{path} has {length:,} bytes instead of {wanted['bytes']:,}")
        place = altered(path, wanted["pieces"], rank, size)
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
    """The newest usable checkpoint of the run in folder ``run``; later ones that cannot be used are named. Raises
    :class:`ConfigError` if there is none."""
    there = steps_in(run / "checkpoints")
    found, _, complaints = newest_of(there)
    for complaint in complaints if found is not None else ():
        print(f"note: an unusable checkpoint is passed over: {complaint}", flush=True)
    if found is None:
        why = "".join(f"\n  {complaint}" for complaint in complaints) or " it has saved none yet"
        raise ConfigError(f"{run / 'checkpoints'} holds no usable checkpoint (step-00000100 or the like):{why}")
    return found
