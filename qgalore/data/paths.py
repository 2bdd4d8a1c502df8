"""Telling a path from a Hugging Face id, helping with a path that does not exist, and folders made on trial."""

import difflib
from contextlib import suppress
from pathlib import Path


def looks_like_path(name: str, endings: tuple[str, ...]) -> bool:
    """True when ``name`` can only be meant as a path: it has one of ``endings``, starts as paths do, or exists."""
    if name.lower().endswith(endings) or name.startswith(("./", "../", "/", "~")) or name in (".", ".."):
        return True
    return exists(Path(name))


def exists(path: Path) -> bool:
    """Whether ``path`` is there; false for a name that no file can have, such as one of 300 characters."""
    try:
        return path.exists()
    except OSError:
        return False


def close_names(path: Path) -> str:
    """A sentence on what could be meant by ``path``, which does not exist; empty when there is nothing to suggest."""
    folder = path.parent
    if not (exists(folder) and folder.is_dir()):
        return f"The folder {str(folder)!r} does not exist either."
    close = difflib.get_close_matches(path.name, sorted(entry.name for entry in folder.iterdir()), n=3, cutoff=0.6)
    return f"Close names in that folder: {', '.join(close)}." if close else ""


def make_folder(path: Path) -> list[Path]:
    """Make a folder, and those that it lies in; returns those that were not there, the innermost first. Raises
    ``OSError``."""
    made = [one for one in (path, *path.parents) if not one.exists()]
    path.mkdir(parents=True, exist_ok=True)
    return made


def drop_empty(made: list[Path]) -> None:
    """Take the folders of :func:`make_folder` away again, but for those in which something lies by now."""
    with suppress(OSError):
        for folder in made:
            folder.rmdir()
