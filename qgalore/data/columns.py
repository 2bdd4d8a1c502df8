"""Rows of parquet files, a bounded number of bytes at a time."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qgalore.data.opening import MAX_LINE, check_expansion, unreadable
from qgalore.errors import ConfigError

_ROWS = 1024
_BYTES = 1 << 24  # of a batch, by what the file says of its size


def parquet_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[tuple[dict[str, Any], str]]:
    """(row, where it stands) of a parquet file; of ``columns`` alone, if they are given and exist. Raises
    ConfigError."""
    # pyarrow takes a good part of a second to import and only this reader needs it.
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, read_dictionary=_repeating(path)) as file:
            names = file.schema_arrow.names
            if double := {name for name in names if names.count(name) > 1}:
                raise ConfigError(f"{str(path)!r} has two columns of the name {min(double)!r}; rename one of them.")
            kept = None if columns is None else [name for name in columns if name in names]
            _check_sizes(path, file.metadata)
            row = 0
            for batch in file.iter_batches(batch_size=_batch_rows(file.metadata), columns=kept):
                for place in range(batch.num_rows):
                    row += 1
                    where = f"{str(path)!r} row {row}"
                    yield {name: _value(batch.column(name)[place], where, name) for name in batch.schema.names}, where
    except UnicodeDecodeError as error:
        raise ConfigError(f"{str(path)!r}: a column is not UTF-8; convert it to UTF-8 text.") from error
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, ConfigError):
            raise
        raise unreadable(path, error) from error


def parquet_names(path: Path) -> list[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_schema(path).names
    except (pyarrow.ArrowException, OSError) as error:
        raise unreadable(path, error) from error


def _repeating(path: Path) -> list[str]:
    """Columns of text that is stored once for all rows that have it: they stay so in memory."""
    import pyarrow.parquet

    metadata = pyarrow.parquet.read_metadata(path)
    found = set()
    for group in range(metadata.num_row_groups):
        part = metadata.row_group(group)
        columns = (part.column(column) for column in range(part.num_columns))
        found |= {c.path_in_schema for c in columns if c.physical_type == "BYTE_ARRAY" and c.has_dictionary_page}
    return sorted(name for name in found if "." not in name)


def _value(scalar, where: str, name: str) -> Any:
    scalar = getattr(scalar, "value", scalar) if type(scalar).__name__ == "DictionaryScalar" else scalar
    size = scalar.as_buffer().size if hasattr(scalar, "as_buffer") and scalar.is_valid else 0
    if size > MAX_LINE:
        raise ConfigError(f"{where}: {name!r} is longer than {MAX_LINE >> 20} MiB, the most that is read; part it.")
    return scalar.as_py()


def _check_sizes(path: Path, metadata) -> None:
    for group in range(metadata.num_row_groups):
        part = metadata.row_group(group)
        for column in range(part.num_columns):
            one = part.column(column)
            check_expansion(path, one.total_compressed_size, one.total_uncompressed_size)


def _batch_rows(metadata) -> int:
    """How many rows to read together. A value that repeats is stored once, so the real size may be larger."""
    size = sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
    return int(max(1, min(_ROWS, _BYTES * max(metadata.num_rows, 1) // max(size, 1))))
