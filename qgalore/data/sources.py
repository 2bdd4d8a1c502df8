"""Documents (whole texts) out of local files, folders of files, and Hugging Face datasets."""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qgalore.data.paths import close_names, looks_like_path
from qgalore.errors import ConfigError

ENDINGS = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")
_ENDINGS_TEXT = ", ".join(ENDINGS)
_PARQUET_ROWS = 1024


class DocumentStream(Iterator[str]):
    """Iterator over the non-blank documents of one source.

    Attributes ``documents`` (given out so far) and ``blank`` (skipped so far: empty, only white space, or null).
    Raises ConfigError at the end of a source that held no document, and from the reader for unreadable input.
    """

    def __init__(self, source: str, texts: Iterator[str | None]):
        self.documents = 0
        self.blank = 0
        self._source = source
        self._texts = texts

    def __next__(self) -> str:
        for text in self._texts:
            if text is not None and text.strip():
                self.documents += 1
                return text
            self.blank += 1
        if self.documents == 0:
            held = f"{self.blank} documents, all blank" if self.blank else "no rows (it is empty)"
            raise ConfigError(f"data source {self._source!r} holds {held}; give a source with some text in it.")
        raise StopIteration


def documents(source: str, *, text_key: str = "text", split: str = "train") -> DocumentStream:
    """Stream the documents of ``source``, blank ones skipped and counted (see DocumentStream).

    source: a file (.txt, .txt.gz: one document; .jsonl, .jsonl.gz, .parquet: one document a row), a folder (every such
        file below it in sorted order, hidden ones left out), or a Hugging Face dataset id with an optional config,
        ``"allenai/c4:en"``, which is streamed.
    text_key: the key or column that holds the text. split: only for Hugging Face datasets.

    Raises ConfigError at once for a path that does not exist or has nothing readable, and while iterating for bytes
    that are not UTF-8, invalid JSON, rows without ``text_key``, a damaged file, a source without text, a Hub failure.
    """
    if looks_like_path(source, ENDINGS):
        files = _local_files(source)
        return DocumentStream(source, (text for path in files for text in _file_texts(path, text_key)))
    dataset_id, _, config = source.partition(":")
    return DocumentStream(source, _dataset_texts(dataset_id, config or None, split, text_key))


def rows(source: str, *, split: str = "train") -> Iterator[tuple[dict, str]]:
    """Stream the rows of ``source`` as they are, each with a description of its place (file and line, or row).

    source: a file (.jsonl, .jsonl.gz), a folder of such files in sorted order, or a Hugging Face dataset id with an
        optional config, as for ``documents``. split: only for Hugging Face datasets.

    Raises ConfigError as ``documents`` does, and for a file that is not JSON lines.
    """
    if not looks_like_path(source, ENDINGS):
        dataset_id, _, config = source.partition(":")
        for number, row in enumerate(_dataset_rows(dataset_id, config or None, split), start=1):
            yield row, f"dataset {dataset_id!r} row {number}"
        return
    for path in _local_files(source):
        if not path.name.endswith((".jsonl", ".jsonl.gz")):
            raise ConfigError(f"{str(path)!r} has no rows with several keys; give .jsonl or .jsonl.gz files only.")
        for row, where in jsonl_rows(path):
            yield _object(row, where), where


def fingerprint(source: str) -> str:
    """What ``source`` holds now, for cache keys: a digest of its files' names, sizes and times, or the dataset id.

    Raises ConfigError as ``documents`` does for a path that does not exist or has nothing readable.
    """
    if not looks_like_path(source, ENDINGS):
        return source
    root = Path(source).expanduser()
    digest = hashlib.sha256()
    for path in _local_files(source):
        name = path.name if path == root else path.relative_to(root).as_posix()
        try:
            stat = path.stat()
        except OSError as error:
            raise _unreadable(path, error) from error
        digest.update(json.dumps([name, stat.st_size, stat.st_mtime_ns]).encode())
    return digest.hexdigest()


def _local_files(source: str) -> list[Path]:
    root = Path(source).expanduser()
    if not root.exists():
        raise ConfigError(f"data source {source!r} does not exist. {close_names(root)}".rstrip())
    if root.is_dir():
        return _folder_files(source, root)
    if not root.name.endswith(ENDINGS):
        raise ConfigError(
            f"data source {source!r} has an ending that is not read; convert it to one of {_ENDINGS_TEXT}."
        )
    return [root]


def _folder_files(source: str, root: Path) -> list[Path]:
    found = []
    for path in root.rglob("*"):
        # Editors, version control and macOS ("._name") leave hidden files that are not the user's text.
        hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        if not hidden and path.name.endswith(ENDINGS) and path.is_file():
            found.append(path)
    if not found:
        raise ConfigError(f"the folder {source!r} has no file that can be read; it needs some of {_ENDINGS_TEXT}.")
    # By parts, so that the order does not depend on how the separator sorts.
    return sorted(found, key=lambda path: path.relative_to(root).parts)


def _unreadable(path: Path, error: Exception) -> ConfigError:
    detail = str(error).splitlines()[0] if str(error) else ""
    return ConfigError(
        f"{str(path)!r} could not be read ({type(error).__name__}: {detail}); check its permissions, and that it is "
        "complete and of the format its ending says."
    )


def _file_texts(path: Path, text_key: str) -> Iterator[str | None]:
    if path.name.endswith(".parquet"):
        return _parquet_texts(path, text_key)
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return _jsonl_texts(path, text_key)
    return _txt_text(path)


def _byte_lines(path: Path) -> Iterator[bytes]:
    try:
        with gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb") as file:
            yield from file
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from error


def _decode(raw: bytes, where: str) -> str:
    try:
        # utf-8-sig: a byte order mark is no part of the text.
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{where} is not UTF-8 (byte 0x{raw[error.start]:02x} at offset {error.start}); convert the file to UTF-8."
        ) from error


def _txt_text(path: Path) -> Iterator[str]:
    yield _decode(b"".join(_byte_lines(path)), repr(str(path)))


def _jsonl_texts(path: Path, text_key: str) -> Iterator[str | None]:
    for row, where in jsonl_rows(path):
        yield _row_text(row, text_key, where)


def jsonl_rows(path: Path) -> Iterator[tuple[Any, str]]:
    """(value, where it stands) of every line of JSON that is not blank. Raises :class:`ConfigError` for other lines."""
    for number, raw in enumerate(_byte_lines(path), start=1):
        where = f"{str(path)!r} line {number}"
        line = _decode(raw, where)
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ConfigError(f"{where} is not valid JSON ({error}); every line must be one JSON object.") from error
        yield row, where


def _object(row: Any, where: str) -> dict:
    if not isinstance(row, dict):
        raise ConfigError(f"{where} is a JSON {type(row).__name__}, not an object; every line must be one JSON object.")
    return row


def _row_text(row: Any, text_key: str, where: str) -> str | None:
    row = _object(row, where)
    if text_key not in row:
        raise _no_text_key(text_key, list(row), where)
    text = row[text_key]
    if text is not None and not isinstance(text, str):
        raise ConfigError(
            f"{where}: {text_key!r} is of type {type(text).__name__}, not text; set text_key to another key."
        )
    return text


def _no_text_key(text_key: str, present: list[str], where: str) -> ConfigError:
    keys = ", ".join(map(repr, present)) or "none"
    return ConfigError(
        f"{where} has no {text_key!r}; the keys present are {keys}: set text_key to the one with the text."
    )


def _parquet_texts(path: Path, text_key: str) -> Iterator[str | None]:
    # pyarrow takes a good part of a second to import and only this reader needs it.
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if text_key not in names:
                raise _no_text_key(text_key, names, repr(str(path)))
            row = 0
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[text_key]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    yield _row_text({text_key: text}, text_key, f"{str(path)!r} row {row}")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{str(path)!r}: column {text_key!r} is not UTF-8; convert it to UTF-8 text.") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error


def _dataset_texts(dataset_id: str, config: str | None, split: str, text_key: str) -> Iterator[str | None]:
    for number, row in enumerate(_dataset_rows(dataset_id, config, split), start=1):
        yield _row_text(row, text_key, f"dataset {dataset_id!r} row {number}")


def _dataset_rows(dataset_id: str, config: str | None, split: str) -> Iterator[dict]:
    # datasets takes about a second to import and only this reader needs it.
    import datasets

    # The Hub, its clients and the file formats behind them raise dozens of types, and all mean the same to the user.
    try:
        rows = iter(datasets.load_dataset(dataset_id, name=config, split=split, streaming=True))
    except Exception as error:
        raise _hub_failure(dataset_id, config, split, error) from error
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise _hub_failure(dataset_id, config, split, error) from error
        yield row


def _hub_failure(dataset_id: str, config: str | None, split: str, error: Exception) -> ConfigError:
    lines = str(error).splitlines() or [""]
    suggestion = close_names(Path(dataset_id)) if Path(dataset_id).parent.is_dir() else ""
    return ConfigError(
        f"dataset {dataset_id!r} (config {config!r}, split {split!r}) is no local path and could not be streamed from "
        f"the Hugging Face Hub ({type(error).__name__}: {lines[0]}). Check the spelling of id, config and split, and "
        f"the network; without network give a local file or folder ({_ENDINGS_TEXT}), or set HF_HOME to a cache that "
        f"holds the dataset, with HF_HUB_OFFLINE=1. {suggestion}".rstrip()
    )
