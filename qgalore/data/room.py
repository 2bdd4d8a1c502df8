"""Whether the disk has room for the tokens of local files, estimated from their beginnings before hours are spent."""

import json
import shutil
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qgalore.data.notes import Notes
from qgalore.data.opening import byte_lines, text_chunks
from qgalore.data.paths import looks_like_path
from qgalore.data.sources import ENDINGS, local_files
from qgalore.errors import ConfigError

LARGE = 1 << 28  # bytes of text below which nothing is estimated: such a disk is soon found to be full
SAMPLE = 1 << 20  # bytes of a file's beginning that are tokenized
LOOKED_AT = 16  # files of a folder whose beginnings are
ZIPPED = 3  # text shrinks to about a third under gzip
SURE = 2  # the rest of the files may have half as many tokens a byte as their beginnings
_READ = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz")  # what of a .parquet or .json file is text is not known beforehand


def check_room(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    text_key: str,
    token_bytes: int,
    max_tokens: int | None,
) -> None:
    """Raise :class:`ConfigError` if the disk of ``folder`` has not even half the room that the tokens of ``source``
    take, by a look at the beginnings of its files. Others than .txt and .jsonl count nothing."""
    if not looks_like_path(source, ENDINGS):
        return
    paths = [path for path in local_files(source, ENDINGS, Notes()) if path.name.lower().endswith(_READ)]
    size = sum(path.stat().st_size * (ZIPPED if _is_zipped(path) else 1) for path in paths)
    free = shutil.disk_usage(folder).free
    if size < LARGE or (max_tokens is not None and max_tokens * token_bytes <= free):
        return
    read = tokens = 0
    for path in paths[:: -(-len(paths) // LOOKED_AT)]:
        length, texts = _beginning(path, text_key)
        read += length
        tokens += sum(map(len, tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])) if texts else 0
    expected = size * tokens // max(read, 1)
    needed = min(expected, max_tokens or expected) * token_bytes
    if needed // SURE <= free:
        return
    zipped = f", gzipped ones being taken to hold {ZIPPED} times their size" if any(map(_is_zipped, paths)) else ""
    raise ConfigError(
        f"{source!r} has about {expected:,} tokens, by {tokens:,} in the first {read:,} of {size:,} bytes{zipped}. "
        f"They take {needed / 1e9:,.1f} GB of {token_bytes} bytes each, and {free / 1e9:,.1f} GB are free for the "
        f"cache in {folder}. Set data.max_tokens to at most {free // token_bytes * 9 // 10}, free some space, or set "
        "data.cache_dir to a folder on a larger disk."
    )


def _is_zipped(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _beginning(path: Path, text_key: str) -> tuple[int, list[str]]:
    """How many bytes were read of a file, about ``SAMPLE``, and the texts in them. What is no row is left for the
    reader to complain of."""
    if path.name.lower().endswith((".txt", ".txt.gz")):
        text = next(text_chunks(path))[:SAMPLE]
        return len(text.encode("utf-8", "replace")), [text]
    read, texts = 0, []
    for line in byte_lines(path):
        read += len(line)
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        text = row.get(text_key) if isinstance(row, dict) else None
        texts += [text] if isinstance(text, str) else []
        if read >= SAMPLE:
            break
    return read, texts
