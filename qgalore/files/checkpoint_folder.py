"""The folder that holds a run's checkpoints: their names, and what in it is ours to rename and to delete.

Only names that a run gives are touched, and of a checkpoint only the three files that it writes. Whatever else somebody
keeps there, hidden folders of file servers and version control included, stays where it is.
"""

import os
import re
from pathlib import Path

from ..errors import ConfigError
from .atomic import sibling

FILES = ("model.safetensors", "optimizer.safetensors")
STATE = "state.json"
_STEP = re.compile(r"step-([0-9]{8,18})")
_LEFTOVER = re.compile(r"\.step-[0-9]{8,18}\.(?:[0-9a-f]{8}\.(?:tmp|old)|deleted)")  # .deleted: of earlier versions


def name_for(step: int) -> str:
    return f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """The step that a checkpoint's name says; None if it is not the name of one."""
    found = _STEP.fullmatch(path.name)
    return int(found[1]) if found and path.name == name_for(int(found[1])) else None


def number_of(path: Path) -> int:
    """The step of a checkpoint that :func:`steps_in` has listed."""
    step = step_of(path)
    assert step is not None, f"{path} has not the name of a checkpoint"
    return step


def steps_in(folder: Path) -> list[Path]:
    """The checkpoints under ``folder``, oldest first; they may yet be damaged. Raises :class:`ConfigError` if the
    folder cannot be listed: what is in it is then unknown."""
    try:
        with os.scandir(folder) as entries:
            found = [folder / entry.name for entry in entries if entry.is_dir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(
            f"the checkpoints in {folder} cannot be listed: {error}; make it a readable folder"
        ) from error
    return sorted((path for path in found if step_of(path) is not None), key=number_of)


def move_aside(path: Path, name: str | None = None) -> Path:
    """Rename ``path`` to ``left-NAME``, or ``left-NAME-2`` and so on where that is taken; returns the new path."""
    name = f"left-{name or path.name}"
    number, target = 1, path.with_name(name)
    while os.path.lexists(target):
        number += 1
        target = path.with_name(f"{name}-{number}")
    return path.rename(target)


def set_aside(folder: Path, step: int) -> list[Path]:
    """Rename checkpoints of steps after ``step`` to ``left-step-…`` and return their new paths: a run that goes on from
    ``step`` takes another course, and neither --resume auto nor pruning may mix the two."""
    return [move_aside(path) for path in steps_in(folder) if number_of(path) > step]


def remove(folder: Path) -> None:
    """Delete a checkpoint so that no moment shows half of it under its own name. Raises ``OSError``."""
    if not folder.is_symlink():  # somebody moved it elsewhere and wants it there
        _clear(folder.rename(sibling(folder, "old")))


def clear_leftovers(folder: Path) -> None:
    """Delete what killed processes left half written or half deleted in ``folder``. Raises ``OSError``."""
    for path in list(folder.iterdir()):
        if _LEFTOVER.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            _clear(path)


def _clear(doomed: Path) -> None:
    """Delete a checkpoint's own files, and the folder if nothing else is in it; otherwise that is kept and said."""
    for name in (*FILES, STATE):
        (doomed / name).unlink(missing_ok=True)
    others = sorted(path.name for path in doomed.iterdir())
    if not others:
        doomed.rmdir()
    elif not all(name.startswith(".nfs") for name in others):  # of NFS, for files still open: gone next time
        kept = move_aside(doomed, doomed.name.split(".")[1])
        print(f"note: {kept} holds {others[0]}, which no run wrote; only the checkpoint in it was deleted", flush=True)
