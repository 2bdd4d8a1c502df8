"""Files and folders that appear under their name whole, or not at all.

What is written goes into a hidden sibling first, reaches the disk, and is renamed. A full disk, a kill or a power cut
therefore leaves the old content, or none, and never half of the new one. Where the disk says no, everything raises
``OSError``, also for libraries in Rust, which have classes of their own. :func:`explained` makes one message of it.
"""

import errno
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from ..data.checksums import sync
from ..data.paths import drop_empty, make_folder
from ..errors import ConfigError

_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{8}\.(tmp|old)")


@contextmanager
def explained(what: str, remedy: str) -> Iterator[None]:
    """Turn an ``OSError`` of the block into :class:`ConfigError`: "``what`` could not be written: …. ``remedy``"."""
    try:
        with plain_errors():
            yield
    except OSError as error:
        raise ConfigError(f"{what} could not be written: {error}. {remedy}") from error


@contextmanager
def plain_errors() -> Iterator[None]:
    """Raise as ``OSError`` what safetensors and tokenizers raise for one: a SafetensorError, which mostly has the
    error's number in its text, or a bare Exception, which always has."""
    try:
        yield
    except Exception as error:
        # Written by Rust for people, and by older safetensors for programmers.
        found = re.search(r"\(os error (\d+)\)|\bOs \{ code: (\d+)", str(error))
        if not isinstance(error, SafetensorError) and (found is None or type(error) is not Exception):
            raise
        if found is None:
            raise OSError(str(error)) from error
        number = int(found[1] or found[2]) if os.name != "nt" else errno.EIO  # Windows counts its errors differently
        raise OSError(number, str(error)) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A context whose value is a hidden sibling of the file ``path``, empty, to be written. At its end the sibling is
    fsync'd, given the permissions that the umask asks for, and renamed to ``path``, or to what that links to; after an
    error it is deleted. Raises ``OSError``."""
    target = Path(os.path.realpath(path))
    fresh = sibling(target, "tmp")
    try:
        with plain_errors():
            fresh.open("xb").close()
            mode = fresh.stat().st_mode
            yield fresh
            _settle(fresh, mode)
            fresh.replace(target)
            sync(target.parent)
    finally:
        fresh.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path, stays: Callable[[Path], bool] = lambda _: False) -> Iterator[Path]:
    """The same for a folder with all that is in it. A folder that stood there is deleted, after the new one has taken
    its place; in between it has the hidden name ``.NAME.….old`` for a moment. One of which ``stays`` is true by then,
    as another process may have made it, is left in its place, and the new one is deleted. Raises ``OSError``."""
    target = Path(os.path.realpath(path))
    fresh, old = sibling(target, "tmp"), sibling(target, "old")
    made: list[Path] = []
    try:
        with plain_errors():
            made = make_folder(target.parent)
            fresh.mkdir()
            yield fresh
            _settle_all(fresh)
            if not (target.exists() and stays(target)):
                _exchange(fresh, target, old, stays)
                sync(target.parent)
    finally:
        for gone in (fresh, old):
            shutil.rmtree(gone, ignore_errors=True)
        drop_empty(made)


def _exchange(fresh: Path, target: Path, old: Path, stays: Callable[[Path], bool]) -> None:
    """Put ``fresh`` in the place of ``target``, if that is there, whose name is ``old`` then. Others may do so too."""
    with suppress(FileNotFoundError):  # another process has moved it
        target.rename(old)
    try:
        fresh.rename(target)
    except OSError:
        if stays(target):
            return
        if old.exists():
            old.rename(target)
        raise


def write_text(path: Path, text: str) -> None:
    """Replace the file ``path`` by ``text`` in UTF-8, whole or not at all. Raises ``OSError``."""
    with replacing(path) as fresh:
        fresh.write_bytes(text.encode("utf-8"))


def write_report(path: Path, text: str) -> None:
    """:func:`write_text` for a file that the user named. A device or a pipe, such as ``/dev/null``, is written to and
    stays. Raises :class:`ConfigError`."""
    target = Path(os.path.realpath(path))
    try:
        if target.exists() and not target.is_file():
            target.write_text(text, encoding="utf-8")
        else:
            write_text(target, text)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error}; choose another file") from error


def sweep(folder: Path) -> None:
    """Delete what a killed process left of its writes in ``folder``, for callers who know that nobody writes there
    now."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if _LEFTOVER.fullmatch(path.name):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def need_room(needed: int, folder: Path) -> None:
    """Raise ``OSError`` if the disk of ``folder`` has not so many bytes free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(f"it needs {needed / 2**20:,.1f} MiB and the disk has {free / 2**20:,.1f} MiB free")


def sibling(path: Path, ending: str) -> Path:
    """A hidden name beside ``path`` that nobody has, and that is known as ours by its form."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.{ending}")


def _settle(path: Path, mode: int) -> None:
    """Permissions as for an ordinary new file (safetensors' own writer leaves 0600), and bytes that are on the disk."""
    path.chmod(mode & 0o7777)
    sync(path)


def _settle_all(folder: Path) -> None:
    probe = sibling(folder / "probe", "tmp")
    probe.touch(exist_ok=False)
    mode = probe.stat().st_mode
    probe.unlink()
    for place, _, names in os.walk(folder):
        for name in names:
            _settle(Path(place, name), mode)
        sync(Path(place))
