"""Rows of JSON files: one object in each line, or one array of objects."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qgalore.data.notes import Notes
from qgalore.data.opening import CHUNK, MAX_LINE, byte_lines, decode, text_chunks
from qgalore.errors import ConfigError

_BLANK = " \t\r\n"


def jsonl_rows(path: Path, notes: Notes) -> Iterator[tuple[Any, str]]:
    """(value, where it stands) of every line of JSON that is not blank. Raises ConfigError for other lines."""
    for number, raw in enumerate(byte_lines(path), start=1):
        where = f"{str(path)!r} line {number}"
        line = decode(raw, where)
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
            raise ConfigError(f"{where} is not valid JSON ({error}); every line must be one JSON object.") from error
        yield (notes.clean(row, where) if "\\u" in line else row), where


def json_rows(path: Path, notes: Notes) -> Iterator[tuple[Any, str]]:
    """(value, where it stands) of every item of a file that is one JSON array, or of its lines if it has an object in
    each. An array is never in memory as a whole. Raises ConfigError for anything else."""
    beginning = next((chunk for chunk in text_chunks(path) if chunk.strip()), "").lstrip()
    if beginning.startswith("["):
        for number, value in enumerate(_Array(path), start=1):
            where = f"{str(path)!r} item {number}"
            yield notes.clean(value, where), where
        return
    first = True
    try:
        for found in jsonl_rows(path, notes):
            yield found
            first = False
    except ConfigError as error:
        if not first:
            raise
        raise ConfigError(
            f"{error} A .json file must be one array of rows, or have one JSON object in each line as .jsonl has."
        ) from error


class _Array:
    """The items of a JSON array, read one after the other."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._chunks = text_chunks(path)
        self._text, self._place, self._ended = "", 0, False
        self._decoder = json.JSONDecoder()

    def __iter__(self) -> Iterator[Any]:
        number = 1
        self._step("[", "an array")
        if self._next() != "]":
            yield self._item(number)
            while self._next() == ",":
                self._step(",", "a comma")
                number += 1
                yield self._item(number)
        self._step("]", f"a comma or the end of the array after item {number}")
        if self._next():
            raise ConfigError(f"{str(self._path)!r} goes on after the end of its array; give one array in a file.")

    def _next(self) -> str:
        """The next character that is not blank; "" at the end of the file."""
        while True:
            while self._place < len(self._text) and self._text[self._place] in _BLANK:
                self._place += 1
            if self._place < len(self._text) or self._ended:
                return self._text[self._place : self._place + 1]
            self._read(1)

    def _step(self, wanted: str, name: str) -> None:
        if self._next() != wanted:
            raise ConfigError(f"{str(self._path)!r} lacks {name}; it is damaged or was not copied whole.")
        self._place += 1

    def _read(self, wanted: int) -> None:
        """Have ``wanted`` characters more to look at, or all that the file has."""
        parts, have = [self._text[self._place :]], len(self._text) - self._place
        while have < wanted and not self._ended:
            chunk = next(self._chunks, None)
            self._ended = chunk is None
            parts.append(chunk or "")
            have += len(parts[-1])
        self._text, self._place = "".join(parts), 0

    def _item(self, number: int) -> Any:
        self._next()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._place)
                if end < len(self._text) or self._ended:
                    self._place = end
                    return value
                problem = "the file ends inside it"
            except (ValueError, RecursionError) as error:
                problem = str(error)
                if isinstance(error, RecursionError):
                    self._ended = True
            have = len(self._text) - self._place
            if self._ended or have > MAX_LINE:
                long = f" within {MAX_LINE >> 20} MiB" if have > MAX_LINE else ""
                raise ConfigError(
                    f"{str(self._path)!r} item {number} is not valid JSON{long} ({problem}); mend it, or convert the "
                    "file to .jsonl, whose lines are read one by one."
                )
            self._read(max(CHUNK, 2 * have))
