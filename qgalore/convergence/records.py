"""The records of a run as data: tolerant of what a run in progress, a killed one or an older version leaves behind."""

import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from .. import plain_yaml
from ..errors import ConfigError, printable

Row = dict[str, Any]
DEPTH = 3  # how far below a folder its runs may lie
OF_SET = "eval_loss/"  # the key of a set's loss in the row of an evaluation begins with it
LARGEST = 1e300  # beyond it a record is damaged: sums of such numbers are no longer finite


@dataclass(frozen=True)
class Run:
    """A run folder as read: its resolved configuration ({} if there is none) and its rows in the order of steps.
    ``unreadable`` counts damaged lines, but for the last of a file, which a run in progress is writing."""

    folder: Path
    name: str
    config: dict[str, Any]
    train: list[Row]
    evaluations: list[Row]
    refreshes: list[Row]
    unreadable: int
    updates: list[Row] = field(default_factory=list)  # updates that were looked at, of rules on whole gradients
    planned_steps: int | None = None  # what epochs came to, for a run whose configuration has no steps

    @cached_property  # asked for every layer
    def step(self) -> int:
        """Optimizer steps done, skipped ones included."""
        return max((row["step"] for row in self.train), default=0)

    @property
    def max_steps(self) -> int | None:
        value = self.setting("train", "max_steps")
        return value if isinstance(value, int) else self.planned_steps

    @property
    def finished(self) -> bool:
        """The last step is done and evaluated: nothing more will be written."""
        last = max((row["step"] for row in self.evaluations), default=0)
        return self.max_steps is not None and min(self.step, last) >= self.max_steps

    def setting(self, section: str, key: str) -> Any:
        """A value of the configuration, or None."""
        found = self.config.get(section)
        return found.get(key) if isinstance(found, dict) else None


def number(row: Row, key: str) -> float | None:
    """``row[key]`` as a finite number; None if it is missing, null or something else (older rows lack newer keys)."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= LARGEST:
        return None
    return value


def numbers(row: Row, key: str) -> list[float] | None:
    value = row.get(key)
    if not isinstance(value, list) or not value:
        return None
    found = [number({"value": item}, "value") for item in value]
    return None if None in found else found


def _held_out_keys(row: Row) -> list[str]:
    """``eval_loss`` and the keys of held-out sets with names, ``eval_loss/NAME``."""
    return [key for key in row if key == "eval_loss" or key.startswith(OF_SET)]


def held_out(run: Run) -> dict[str, list[tuple[int, float]]]:
    """The (step, loss) of each held-out set by its name, which is "" for the loss over all of them."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in run.evaluations:
        for key in _held_out_keys(row):
            if (value := number(row, key)) is not None:
                found.setdefault(key.removeprefix("eval_loss").removeprefix("/"), []).append((row["step"], value))
    return found


def is_run(folder: Path) -> bool:
    return (folder / "metrics.jsonl").exists() or (folder / "config.yaml").exists()


def find_runs(folder: Path, depth: int = DEPTH) -> list[Path]:
    """The run folders below ``folder``, which is none itself, in the order of their names; runs are not looked into."""
    found: list[Path] = []
    for part in sorted(folder.iterdir()):
        if part.is_dir() and not part.is_symlink() and not part.name.startswith("."):
            found += [part] if is_run(part) else find_runs(part, depth - 1) if depth > 1 else []
    return found


def read_run(folder: Path) -> Run:
    """Read a run folder; files that are not there yet count as empty. Raises :class:`ConfigError` if it holds no
    run."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ConfigError(f"{folder} {what}; give a run's folder, such as runs/quickstart")
    if not is_run(folder):
        raise ConfigError(
            f"{folder} is not a run's folder: it has neither metrics.jsonl nor config.yaml, and no folder below it "
            "has; give one such as runs/quickstart, or a folder of runs"
        )
    metrics, damaged = _read_rows(folder / "metrics.jsonl")
    refreshes, damaged_too = _read_rows(folder / "subspace.jsonl")
    updates, damaged_three = _read_rows(folder / "updates.jsonl")
    return Run(
        folder=folder,
        name=printable(folder.resolve().name),
        config=_read_config(folder / "config.yaml"),
        train=[row for row in metrics if "lr" in row],
        evaluations=[row for row in metrics if any(number(row, key) is not None for key in _held_out_keys(row))],
        refreshes=[row for row in refreshes if isinstance(row.get("layer"), str)],
        unreadable=damaged + damaged_too + damaged_three,
        updates=[row for row in updates if isinstance(row.get("layer"), str)],
        planned_steps=_planned_steps(folder / "plan.json"),
    )


def require_rows(run: Run) -> Run:
    """``run``, if it has taken a step. Raises :class:`ConfigError` if there is nothing to show yet."""
    if not run.train:
        raise ConfigError(
            f"{run.folder / 'metrics.jsonl'} holds no train row: the run has not taken a step yet; wait for its "
            "first one, or add --follow to wait for it here"
        )
    return run


def distinct(runs: list[Run]) -> list[Run]:
    """The runs, each once, named by their whole path where two folders bear one name."""
    runs = list({run.folder.resolve(): run for run in runs}.values())
    names = [run.name for run in runs]
    return [replace(run, name=printable(str(run.folder))) if names.count(run.name) > 1 else run for run in runs]


def _clean(value: Any) -> Any:
    """``value`` without control characters in its texts: they reach the terminal, pages and tables."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, list):
        return [_clean(item) for item in value]
    return {printable(key): _clean(item) for key, item in value.items()} if isinstance(value, dict) else value


def _read_rows(path: Path) -> tuple[list[Row], int]:
    """The rows that carry a step, and the number of damaged lines before the last."""
    if not path.exists():
        return [], 0
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    rows, damaged = [], 0
    for place, line in enumerate(lines, start=1):
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            row, damaged = None, damaged + (place < len(lines))
        if isinstance(row, dict) and isinstance(number(row, "step"), int):
            rows.append(_clean(row))
    return rows, damaged


def _planned_steps(path: Path) -> int | None:
    try:
        steps = json.loads(path.read_bytes()).get("max_steps")
    except (OSError, ValueError, AttributeError, RecursionError):  # missing, as in old runs, or damaged
        return None
    return steps if type(steps) is int and 0 < steps < LARGEST else None


def _read_config(path: Path) -> dict[str, Any]:
    try:
        found = plain_yaml.read(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # missing, just being written, or no configuration: its columns show "-"
        return {}
    return found if isinstance(found, dict) else {}
