"""Documents (whole texts) and rows out of local files, folders of files, and Hugging Face datasets."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qgalore.data.checksums import content_digest
from qgalore.data.columns import parquet_names, parquet_rows
from qgalore.data.hub import dataset_rows
from qgalore.data.jsons import json_rows, jsonl_rows
from qgalore.data.notes import Notes, listed
from qgalore.data.opening import Unfinished, in_pieces, text_chunks, unreadable
from qgalore.data.paths import close_names, exists, looks_like_path
from qgalore.errors import ConfigError, counted

ROW_ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")  # rows with keys
ENDINGS = (".txt", ".txt.gz", *ROW_ENDINGS)


class DocumentStream(Iterator[str]):
    """Iterator over the non-blank documents of one source. A long document comes in pieces, all but its last
    ``opening.Unfinished``. ``blank`` counts documents skipped so far. Raises ConfigError at the end of a source that
    held no document, and from the reader for unreadable input."""

    def __init__(self, source: str, texts: Iterator[str | None], notes: Notes | None = None):
        self.documents = 0
        self.blank = 0
        self.notes = Notes() if notes is None else notes
        self._source = source
        self._pieces = (piece for text in texts for piece in _pieces(text))
        self._inside = False

    def __next__(self) -> str:
        for text in self._pieces:
            goes_on = isinstance(text, Unfinished)
            if text is not None and (goes_on or self._inside or text.strip()):
                self._inside = goes_on
                self.documents += not goes_on
                return text
            self.blank += 1
        if self.documents == 0:
            held = f"{counted(self.blank, 'document')}, all blank" if self.blank else "no rows (it is empty)"
            raise ConfigError(f"data source {self._source!r} holds {held}; give a source with some text in it.")
        raise StopIteration


def _pieces(text: Any) -> Iterator[str | None]:
    if text is None:
        yield None
    else:
        yield from in_pieces([text] if isinstance(text, str) else text)


def documents(source: str, *, text_key: str = "text", split: str = "train") -> DocumentStream:
    """Stream the documents of ``source``, blank ones skipped and counted.

    source: a file (.txt, .txt.gz: one document; of ``ROW_ENDINGS``: one document a row), a folder (every such file
    below it in sorted order, hidden ones left out), or a Hugging Face dataset id with an optional config,
    ``"allenai/c4:en"``, which is streamed. text_key: the key or column that holds the text. split: only for Hugging
    Face datasets. Raises ConfigError at once for a path that has nothing readable, and while iterating for damaged
    input.
    """
    notes = Notes()
    if looks_like_path(source, ENDINGS):
        files = local_files(source, ENDINGS, notes)
        texts = (text for path in files for text in _file_texts(path, text_key, notes))
    else:
        texts = _dataset_texts(source, split, text_key)
    return DocumentStream(source, texts, notes)


def rows(source: str, *, split: str = "train", notes: Notes | None = None) -> Iterator[tuple[dict, str]]:
    """Stream the rows of ``source``, which is as for :func:`documents` but for .txt, each with a description of its
    place. notes: gets what is left out or changed. Raises ConfigError as that does."""
    notes = Notes() if notes is None else notes
    if not looks_like_path(source, ENDINGS):
        return dataset_rows(source, split, ROW_ENDINGS)
    files = local_files(source, ROW_ENDINGS, notes)
    return (found for path in files for found in file_rows(path, notes))


def fingerprint(
    source: str, endings: tuple[str, ...] = ENDINGS, *, report: Callable[[str], None] = lambda line: None
) -> str:
    """What ``source`` holds now, for cache keys: a digest of its files' names and contents, or the dataset id. Large
    files take about a second for each GB. Raises ConfigError."""
    if not looks_like_path(source, ENDINGS):
        return source
    root = Path(source).expanduser()
    digest = hashlib.sha256()
    for path in local_files(source, endings, Notes()):
        name = path.name if path == root else path.relative_to(root).as_posix()
        try:
            content = content_digest(path, report)
        except OSError as error:
            raise unreadable(path, error) from error
        digest.update(json.dumps([name, content]).encode())
    return digest.hexdigest()


def local_files(source: str, endings: tuple[str, ...], notes: Notes) -> list[Path]:
    """The files of a local ``source`` that end in one of ``endings``; ``notes`` gets those of a folder that do not.
    Raises ConfigError if there are none."""
    root = Path(source).expanduser()
    listing = ", ".join(endings)
    if not exists(root):
        raise ConfigError(f"data source {source!r} does not exist. {close_names(root)}".rstrip())
    if root.is_dir():
        found = _folder_files(root, endings, notes)
        if not found:
            other = f"; of other endings it has {', '.join(notes.left_out[:5])}" if notes.left_out else ""
            raise ConfigError(f"the folder {source!r} has no file that can be read; it needs some of {listing}{other}.")
        return found
    if not root.name.lower().endswith(endings):
        raise ConfigError(f"data source {source!r} has an ending that is not read here; convert it to {endings[0]}, "
                          f"or another of {listing}.")  # fmt: skip
    if not root.is_file():
        raise ConfigError(f"data source {source!r} is no ordinary file; write what it gives to a file first.")
    return [root]


def _folder_files(root: Path, endings: tuple[str, ...], notes: Notes) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise ConfigError(
            f"the folder {str(error.filename)!r} cannot be looked into ({error.strerror}); allow it, or move it away."
        ) from error

    found, seen = [], set()
    for place, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        here = Path(place)
        seen.add((here.stat().st_dev, here.stat().st_ino))
        # Editors, version control and macOS ("._name") leave hidden files that are not the user's text.
        notes.hidden += sum(name.startswith(".") for name in (*folders, *names))
        folders[:] = [name for name in folders if not name.startswith(".") and not _known(here / name, seen)]
        for path in (here / name for name in names if not name.startswith(".")):
            if path.name.lower().endswith(endings) and path.is_file():
                found.append(path)
            else:
                name = path.relative_to(root).as_posix()
                notes.left_out.append(name.encode("utf-8", "replace").decode())  # it is printed
    found = _once(found, root, notes)
    notes.left_out.sort()
    notes.read = ", ".join(endings)
    # By parts, so that the order does not depend on how the separator sorts.
    return sorted(found, key=lambda path: path.relative_to(root).parts)


def _once(found: list[Path], root: Path, notes: Notes) -> list[Path]:
    """``found`` without links to files that are in it already, whose text would count twice."""
    home, kept = root.resolve(), {}
    for path in sorted(found, key=lambda path: path.resolve() != home / path.relative_to(root)):
        if kept.setdefault(path.resolve(), path) is not path:
            notes.linked.append(path.relative_to(root).as_posix().encode("utf-8", "replace").decode())
    return list(kept.values())


def _known(folder: Path, seen: set[tuple[int, int]]) -> bool:
    """Whether a link leads back to a folder that was looked into."""
    return (folder.stat().st_dev, folder.stat().st_ino) in seen


def _file_texts(path: Path, text_key: str, notes: Notes) -> Iterator[Any]:
    """Texts, None for a null; of a .txt the chunks of its one text."""
    name = path.name.lower()
    if name.endswith((".txt", ".txt.gz")):
        yield text_chunks(path)
        return
    if name.endswith(".parquet"):
        names = parquet_names(path)
        if text_key not in names:
            raise _no_text_key(text_key, names, repr(str(path)))
        found = parquet_rows(path, [text_key])
    else:
        found = file_rows(path, notes)
    for row, where in found:
        yield _row_text(row, text_key, where)


def _dataset_texts(source: str, split: str, text_key: str) -> Iterator[str | None]:
    return (_row_text(row, text_key, where) for row, where in dataset_rows(source, split, ENDINGS))


def file_rows(path: Path, notes: Notes) -> Iterator[tuple[dict, str]]:
    """The rows of one file, as :func:`rows` gives them."""
    name = path.name.lower()
    if name.endswith(".parquet"):
        yield from parquet_rows(path)
        return
    for row, where in jsonl_rows(path, notes) if name.endswith((".jsonl", ".jsonl.gz")) else json_rows(path, notes):
        if not isinstance(row, dict):
            raise ConfigError(
                f"{where} is a JSON {type(row).__name__}, not an object; every line, or item of an array, must be one "
                "JSON object."
            )
        yield row, where


def _row_text(row: dict, text_key: str, where: str) -> str | None:
    if text_key not in row:
        raise _no_text_key(text_key, list(row), where)
    text = row[text_key]
    if text is not None and not isinstance(text, str):
        raise ConfigError(
            f"{where}: {text_key!r} is of type {type(text).__name__}, not text; set text_key to another key."
        )
    return text


def _no_text_key(text_key: str, present: list[str], where: str) -> ConfigError:
    talk = any(key in present for key in ("messages", "conversations", "instruction", "completion"))
    task = " For conversations, whose answers are learned, set data.task=instruct." if talk else ""
    return ConfigError(
        f"{where} has no {text_key!r}; the keys present are {listed(present)}: set text_key to the one with the text."
        f"{task}"
    )
