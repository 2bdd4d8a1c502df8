"""Rows of a Hugging Face dataset, streamed."""

import atexit
import gc
import time
from collections.abc import Iterator
from pathlib import Path

from qgalore.data.paths import close_names
from qgalore.errors import ConfigError


def dataset_rows(source: str, split: str, endings: tuple[str, ...]) -> Iterator[tuple[dict, str]]:
    """(row, where it stands) of ``source``, an id with an optional config: ``"allenai/c4:en"``. endings: of local files
    that would do instead, for the message. Raises ConfigError for whatever goes wrong."""
    # datasets takes about a second to import and only this reader needs it.
    import datasets

    atexit.unregister(_let_go)
    atexit.register(_let_go)
    dataset_id, _, config = source.partition(":")
    # The Hub, its clients and the file formats behind them raise dozens of types, and all mean the same to the user.
    try:
        rows = iter(datasets.load_dataset(dataset_id, name=config or None, split=split, streaming=True))
    except Exception as error:
        raise _failure(dataset_id, config, split, endings, error) from error
    number = 0
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise _failure(dataset_id, config, split, endings, error) from error
        number += 1
        yield row, f"dataset {dataset_id!r} row {number}"


def _let_go() -> None:
    """Wait until Arrow's threads have let go of the files of streams that were left early. One that still wants the
    interpreter when it ends aborts the whole program (Arrow's issue 45214). Registered anew by each stream, so that it
    runs before what ``datasets`` registers."""
    gc.collect()
    time.sleep(0.1)  # they need the interpreter for a few microseconds each


def _failure(dataset_id: str, config: str, split: str, endings: tuple[str, ...], error: Exception) -> ConfigError:
    lines = str(error).splitlines() or [""]
    suggestion = close_names(Path(dataset_id)) if Path(dataset_id).parent.is_dir() else ""
    return ConfigError(
        f"dataset {dataset_id!r} (config {config or None!r}, split {split!r}) is no local path and could not be "
        f"streamed from the Hugging Face Hub ({type(error).__name__}: {lines[0]}). Check the spelling of id, config "
        f"and split, and the network; without network give a local file or folder ({', '.join(endings)}), or set "
        f"HF_HOME to a cache that holds the dataset, with HF_HUB_OFFLINE=1. {suggestion}".rstrip()
    )
