"""Bytes and lines of local files, plain or gzipped, read within bounds."""

import codecs
import gzip
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from qgalore.errors import ConfigError

MAX_LINE = 1 << 26  # bytes of a line, or of an item of a JSON array; a long book is a tenth of it
PIECE = 1 << 20  # characters of a document that are tokenized together
CHUNK = 1 << 20
# Text seldom shrinks to a tenth. What expands this much is made to fill a memory or a disk.
_BOMB_BYTES, _BOMB_RATIO = 1 << 22, 500
_DEFLATE_RATIO = 1040  # no gzip file expands further: one that says so is damaged, and reading it tells how
_NULS = 4  # of so many characters one is zero: no text, but UTF-16 or UTF-32 read as UTF-8
_CUT = re.compile(r"(?<=\S)[ \n](?=\S)")  # where tokenizers part words anyway
_SEARCHED = 1 << 16


class Unfinished(str):
    """A piece of a document of which more pieces follow."""

    __slots__ = ()


def unreadable(path: Path, error: Exception) -> ConfigError:
    """The complaint about a file that cannot be opened or decoded."""
    detail = str(error).splitlines()[0] if str(error) else ""
    return ConfigError(
        f"{str(path)!r} could not be read ({type(error).__name__}: {detail}); check its permissions, and that it is "
        "complete and of the format its ending says."
    )


def check_expansion(path: Path, stored: int, expanded: int) -> None:
    """Refuse a file whose ``stored`` bytes have become ``expanded`` ones, far more than text does."""
    if expanded > _BOMB_BYTES and expanded > _BOMB_RATIO * stored:
        raise ConfigError(
            f"{str(path)!r} has {stored:,} bytes and expands to more than {expanded:,}; text never shrinks by a factor "
            f"of {_BOMB_RATIO}, so this file would only fill the memory. Give the text itself."
        )


def _stated_size(path: Path) -> int:
    """The size that the end of a gzip file states for its last member, in bytes modulo 2³²."""
    with path.open("rb") as file:
        file.seek(-4, os.SEEK_END)
        return int.from_bytes(file.read(4), "little")


def _parts(path: Path, read: Callable[[BinaryIO], bytes]) -> Iterator[bytes]:
    """What ``read(file)`` gives until it gives nothing, of the decompressed file."""
    zipped = path.name.lower().endswith(".gz")
    try:
        stored, expanded = path.stat().st_size, 0
        if zipped and stored >= 4 and (stated := _stated_size(path)) < _DEFLATE_RATIO * stored:
            check_expansion(path, stored, stated)  # before the first of it is tokenized
        with gzip.open(path, "rb") if zipped else path.open("rb") as file:
            while part := read(file):
                yield part
                expanded += len(part)
                if zipped:
                    check_expansion(path, stored, expanded)
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(path, error) from error


def byte_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file. Raises ConfigError for one that is longer than ``MAX_LINE`` bytes, naming it."""
    for number, raw in enumerate(_parts(path, lambda file: file.readline(MAX_LINE + 1)), start=1):
        if len(raw) > MAX_LINE:
            raise ConfigError(
                f"{str(path)!r} line {number} is longer than {MAX_LINE >> 20} MiB, the most that is read as one; part "
                "it into several rows."
            )
        yield raw


def decode(raw: bytes, where: str, before: int = 0) -> str:
    """UTF-8 bytes as text, without a byte order mark. ``before``: the bytes that come before ``raw`` in its file."""
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{where} is not UTF-8 (byte 0x{raw[error.start]:02x} at offset {before + error.start}); convert the file "
            "to UTF-8."
        ) from error


def text_chunks(path: Path) -> Iterator[str]:
    """The text of a file, about a MiB at a time."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    pending, before = b"", 0
    for raw in _parts(path, lambda file: file.read(CHUNK)):
        whole = pending + raw
        try:
            decoder.reset()
            text = decoder.decode(whole)
        except UnicodeDecodeError:
            decode(whole, repr(str(path)), before)
            raise
        pending = decoder.getstate()[0]
        if _NULS * text.count("\0") >= len(text) > 1:
            raise ConfigError(
                f"{str(path)!r} holds a zero byte in every {_NULS} or fewer, as UTF-16 does; convert the file to UTF-8."
            )
        yield text.removeprefix("\ufeff") if before == 0 else text
        before += len(whole) - len(pending)
    yield decode(pending, repr(str(path)), before)


def in_pieces(chunks: Iterable[str]) -> Iterator[str]:
    """One document as pieces of at most ``PIECE`` characters, cut between words where there are any, all but the last
    of them :class:`Unfinished`."""
    rest = ""
    for chunk in chunks:
        rest += chunk
        while len(rest) > PIECE:
            places = [match.start() for match in _CUT.finditer(rest, PIECE - _SEARCHED, PIECE)]
            cut = places[-1] if places else PIECE
            yield Unfinished(rest[:cut])
            rest = rest[cut:]
    yield rest
