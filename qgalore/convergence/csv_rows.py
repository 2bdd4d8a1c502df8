"""All refresh rows of some runs as one CSV table, for a spreadsheet or pandas."""

import csv
import io
import json
from typing import Any

from .records import Run

FIRST = (
    "run", "step", "layer", "first", "failed", "similarity", "overlap", "overlap_above_chance", "first_vector",
    "energy", "energy_before", "gap", "next_refresh", "refreshes", "seconds",
)  # fmt: skip


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """A list becomes numbered columns, ``shape`` → ``shape_0``, ``shape_1``; None becomes an empty cell."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, list):
            flat.update({f"{key}_{i}": item for i, item in enumerate(value)})
        else:
            flat[key] = json.dumps(value) if isinstance(value, (bool, dict)) else value
    return flat


def refresh_rows(runs: list[Run]) -> str:
    """CSV text: a line for each refresh, with the columns of all versions of rows; what a row lacks is empty."""
    rows = [{"run": run.name, **_flat(row)} for run in runs for row in run.refreshes]
    columns = list(dict.fromkeys([*FIRST, *(key for row in rows for key in row)]))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
