"""One process at a time in a run's folder.

The lock is a POSIX record lock (``fcntl``) on ``RUN/.lock``. The system drops it when its process ends, however that
happens, so no stale lock can keep a run from going on. NFS passes such locks to its server; where a file system has
none, a line says so. The processes that torchrun starts count as one: rank 0 holds the lock for all. A start that was
refused takes the file away again, and the folders that were made for it.
"""

import errno
import json
import os
import socket
import struct
import sys
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError

NAME = ".lock"
_held: dict[tuple[int, str], "_Held"] = {}  # by process and path


@dataclass
class _Held:
    """A lock's open file, what lay beside it, what was made for it (itself and folders, the innermost first), and how
    many objects hold it."""

    descriptor: int
    beside: set[str]
    made: list[Path]
    objects: int = 0

    def end(self, path: Path) -> None:
        """Let go. What was made goes too, if nothing has come to lie beside it: the start was refused."""
        with suppress(OSError):
            if {*os.listdir(path.parent)} - {NAME} == self.beside:
                for one in self.made:
                    one.unlink() if one == path else one.rmdir()
        os.close(self.descriptor)


class RunLock:
    """The lock of a run's ``folder``, held until :meth:`release`, the end of this object or that of the process.
    ``made``: the folders that were made for it, the innermost first. A process may hold the same one several times.
    Raises :class:`ConfigError` if another one holds it. ``works`` is False where the file system cannot lock, which is
    said."""

    def __init__(self, folder: Path, made: Sequence[Path] = ()) -> None:
        path = folder.resolve() / NAME
        key = (os.getpid(), str(path))
        is_first = key not in _held
        if is_first:
            mine = [*([] if path.exists() else [path]), *made]
            try:
                # Closing any descriptor of the file would drop the lock, so a process opens it only once.
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            except OSError as error:
                raise ConfigError(f"the run folder {folder} cannot be written: {error}; set run.dir") from error
            try:
                self._take(descriptor, folder)
            except BaseException:
                os.close(descriptor)
                raise
            _held[key] = _Held(descriptor, {*os.listdir(path.parent)} - {NAME}, mine)
        _held[key].objects += 1
        self.works = _works(_held[key].descriptor)
        self.release = weakref.finalize(self, _release, key)
        if is_first and self.works:
            self._sign(_held[key].descriptor, folder)

    def _take(self, descriptor: int, folder: Path) -> None:
        try:
            _lock(descriptor)
            if not os.path.samestat(os.fstat(descriptor), os.stat(folder / NAME)):
                raise BlockingIOError
        except (BlockingIOError, PermissionError, FileNotFoundError):  # EAGAIN or EACCES; or it was just taken away
            raise ConfigError(
                f"{folder} is in use: {_holder(descriptor)} trains this run and holds its lock. Wait for it, stop it, "
                "or choose another run.name"
            ) from None
        except OSError as error:
            print(
                f"note: {folder} lies on a file system that cannot lock files ({error.strerror}), so nothing keeps a "
                "second process out of this run; start only one",
                flush=True,
            )

    def _sign(self, descriptor: int, folder: Path) -> None:
        about = {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        text = json.dumps(about).encode()
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, text, 0)
        except OSError as error:
            raise ConfigError(f"the run folder {folder} cannot be written: {error}; set run.dir") from error


def _lock(descriptor: int) -> None:
    """Raises ``OSError``: ``BlockingIOError`` or ``PermissionError`` if another process has the lock."""
    try:
        import fcntl
    except ImportError:  # Windows
        raise OSError(errno.ENOSYS, "no such locks on this system") from None
    fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _works(descriptor: int) -> bool:
    """Whether the lock can be had, which this process then has."""
    try:
        _lock(descriptor)
    except OSError:
        return False
    return True


def _holder(descriptor: int) -> str:
    """Who holds the lock, as far as the file says."""
    try:
        about = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {int(about['process'])} on {about['host']!s}, since {about['since']!s},"
    except (OSError, ValueError, TypeError, KeyError):
        return "another process"


def _release(key: tuple[int, str]) -> None:
    if key[0] == os.getpid() and key in _held:
        _held[key].objects -= 1
        if not _held[key].objects:
            _held.pop(key).end(Path(key[1]))


def is_held(folder: Path) -> bool | None:
    """Whether a process trains the run in ``folder``, asked without taking the lock; None where a system cannot say."""
    if (os.getpid(), str(folder.resolve() / NAME)) in _held:
        return True
    if sys.platform != "linux" or struct.calcsize("P") != 8:  # elsewhere the question has another layout
        return None
    import fcntl

    layout = "@hhqqi4x"  # struct flock: kind, whence, start, length, process
    try:
        with open(folder / NAME, "rb") as file:
            question = struct.pack(layout, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            answer = struct.unpack(layout, fcntl.fcntl(file, fcntl.F_GETLK, question))
    except FileNotFoundError:
        return False
    except OSError:
        return None
    return answer[0] != fcntl.F_UNLCK
