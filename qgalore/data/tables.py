"""Rows of tables: .tsv as GLUE writes it, .csv, JSON and parquet."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qgalore.data.columns import parquet_names, parquet_rows
from qgalore.data.notes import Notes, listed
from qgalore.data.opening import byte_lines, decode
from qgalore.data.sources import file_rows
from qgalore.errors import ConfigError

ENDINGS = (
    ".tsv", ".csv", ".tsv.gz", ".csv.gz", ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet",
)  # fmt: skip
_LONGEST_CELL = 1 << 24  # characters


def table_rows(path: Path, header: bool, wanted: Sequence[str], notes: Notes) -> Iterator[tuple[dict[str, Any], str]]:
    """(row, where it stands) of a file with one of ``ENDINGS``. Without ``header`` the columns of a .tsv or .csv are
    called "0", "1", …. Of a parquet file only the columns ``wanted`` are read. Raises ConfigError."""
    name = path.name.lower().removesuffix(".gz")
    if name.endswith(".parquet"):
        names = parquet_names(path)
        if missing := [key for key in wanted if key not in names]:
            raise ConfigError(
                f"{path} has no {missing[0]!r}; its keys are {listed(names)}: set data.text_keys and data.label_key"
            )
        yield from parquet_rows(path, list(wanted))
    elif name.endswith((".jsonl", ".json")):
        yield from file_rows(path, notes)
    else:
        yield from _separated(path, header, name.endswith(".tsv"), wanted)


def _separated(path: Path, header: bool, tabs: bool, wanted: Sequence[str]) -> Iterator[tuple[dict[str, Any], str]]:
    lines = (decode(raw, f"{str(path)!r} line {number}") for number, raw in enumerate(byte_lines(path), start=1))
    csv.field_size_limit(_LONGEST_CELL)
    # GLUE's files use tabs and no quoting at all: a lone " is an ordinary character there. Elsewhere a quote that is
    # not closed would make one cell of the rest of the file, which strict mode refuses.
    kind: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"strict": True}
    reader = csv.reader(lines, **kind)
    names: list[str] | None = None
    try:
        for cells in reader:
            where = f"{path} line {reader.line_num}"
            if not cells:
                continue
            if header and names is None:
                names = cells
                if double := [key for key in wanted if names.count(key) > 1]:
                    raise ConfigError(f"{where} names two columns {double[0]!r}; rename one of them")
                continue
            if names is not None and any(cell.strip() for cell in cells[len(names) :]):
                raise ConfigError(
                    f"{where} has {len(cells)} cells, and the first line names {len(names)} columns; quote a cell that "
                    "has a comma in it, or use another format"
                )
            yield dict(zip(names or map(str, range(len(cells))), cells, strict=False)), where
    except csv.Error as error:
        raise ConfigError(
            f"{path} line {reader.line_num} is not a row of a table: {error}; mend the line, or use .jsonl"
        ) from error
