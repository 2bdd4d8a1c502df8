"""Checksums of files, taken in chunks, with a line now and then for large ones."""

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

_CHUNK = 1 << 22
_LINE_EVERY = 10.0  # seconds
_known: dict[tuple, str] = {}  # by path and state, of this process


def file_digest(path: Path, report: Callable[[str], None]) -> str:
    """Hex BLAKE2b (32 bytes) of the whole file. Every 10 seconds ``report`` gets a line. Raises OSError."""
    digest = hashlib.blake2b(digest_size=32)
    done, line_at = 0, time.monotonic() + _LINE_EVERY
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            if time.monotonic() >= line_at:
                report(f"checksum of {path}: {done / max(size, 1):.0%} of {size / 1e9:.1f} GB")
                line_at = time.monotonic() + _LINE_EVERY
    return digest.hexdigest()


def content_digest(path: Path, report: Callable[[str], None]) -> str:
    """As :func:`file_digest`, taken once in a process for a file that stays as it is. Raises OSError."""
    now = path.stat()
    key = (path.absolute(), now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino)
    if key not in _known:
        _known[key] = file_digest(path, report)
    return _known[key]


def sync(path: Path) -> None:
    """Have a file, or a folder's names, on the disk itself. Raises OSError."""
    if os.name == "nt" and path.is_dir():  # which opens no folders; its renames are journalled
        return
    # Windows only syncs what was opened for writing, and no folder can be.
    number = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | getattr(os, "O_BINARY", 0))
    try:
        os.fsync(number)
    finally:
        os.close(number)
