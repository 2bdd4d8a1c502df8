"""What a run writes about itself: JSON-lines records, memory in use, and the progress line."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import counted
from ..files import atomic


class Records:
    """An append-only ``.jsonl`` file whose rows carry ``step``. What is no row, such as the line that a killed run was
    writing, is set aside: its bytes go to ``NAME.set-aside``. Its methods raise ConfigError on an I/O error."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._evaluations: dict[int, str] | None = None  # the last row of an evaluation by step; None: not read yet

    def append(self, rows: list[dict[str, Any]]) -> None:
        if rows:
            with self._writing(), self.path.open("a", encoding="utf-8") as file:
                file.writelines(_line(row) + "\n" for row in rows)

    def append_evaluation(self, row: dict[str, Any]) -> None:
        """Append the row of an evaluation, in place of another of the same step: a finished run that is asked to go on
        looks at the held-out data once more."""
        if self._evaluations is None:
            with self._writing():
                self._evaluations = {number: text for number, text, is_one in self._read() if is_one}
        there, text = self._evaluations.get(row["step"]), _line(row)
        if there == text:
            return
        if there is not None:
            self._rewrite(lambda number, is_one: not (is_one and number == row["step"]))
        self.append([row])
        self._evaluations[row["step"]] = text

    def cut_back(self, step: int) -> None:
        """Drop the rows of steps above ``step``: a resumed run writes them again."""
        self._rewrite(lambda number, is_one: number <= step)
        self._evaluations = None

    def _rewrite(self, keep: Callable[[int, bool], bool]) -> None:
        """Leave the rows for which ``keep(step, whether it is an evaluation's)`` holds, of evaluations of one step the
        last alone. Bytes that stay are not changed."""
        with self._writing():
            rows = self._read()
            last = {number: place for place, (number, _, is_one) in enumerate(rows) if is_one}
            kept = [
                text
                for place, (number, text, is_one) in enumerate(rows)
                if keep(number, is_one) and not (is_one and last[number] != place)
            ]
            content = "".join(text + "\n" for text in kept)
            if self.path.exists() and self.path.read_bytes() != content.encode():
                atomic.write_text(self.path, content)

    def _read(self) -> list[tuple[int, str, bool]]:
        """(step, line, whether it is an evaluation's) of each row. Other lines are moved out of the file first."""
        rows, others = [], []
        try:
            lines = self.path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        for place, line in enumerate(lines, start=1):
            row = _row(line)
            if row is not None:
                rows.append((row["step"], line.decode(), "eval_loss" in row))
            elif line.strip():
                others.append((place, line))
        if others:
            aside = self.path.with_name(f"{self.path.name}.set-aside")
            with aside.open("ab") as file:
                file.writelines(line + b"\n" for _, line in others)
                file.flush()
                os.fsync(file.fileno())
            atomic.write_text(self.path, "".join(text + "\n" for _, text, _ in rows))
            print(
                f"note: {counted(len(others), 'line')} of {self.path} (the first is line "
                f"{others[0][0]}) cannot be read as a record; kept in {aside}",
                flush=True,
            )
        return rows

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with atomic.explained(
            str(self.path), "Checkpoints so far are intact; free space, then go on with --resume auto"
        ):
            yield


def _line(row: dict[str, Any]) -> str:
    """The row as JSON proper, which has no NaN and no infinity: they become null."""
    try:
        return json.dumps(row, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(row), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _row(line: bytes) -> dict[str, Any] | None:
    """The record in a line; None if there is none: a JSON object with a whole ``step`` from 0 on."""
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    whole = isinstance(row, dict) and type(row.get("step")) is int and row["step"] >= 0
    return row if whole else None


class Silence(Records):
    """The records of a process that leaves writing to another."""

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Write nothing."""

    def append_evaluation(self, row: dict[str, Any]) -> None:
        """Write nothing."""

    def cut_back(self, step: int) -> None:
        """Write nothing."""


def memory_bytes(device: torch.device) -> int:
    """Peak bytes so far: allocated by PyTorch on a GPU, the process's resident set on a CPU (0 where unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_row(device: torch.device) -> dict[str, int]:
    """For a row of metrics.jsonl: :func:`memory_bytes`, and on a GPU what PyTorch's allocator holds at most."""
    row = {"memory_bytes": memory_bytes(device)}
    return row if device.type != "cuda" else row | {"reserved_bytes": torch.cuda.max_memory_reserved(device)}


def human_time(seconds: float) -> str:
    """``75 → 1m15s``, ``7200 → 2h00m``."""
    seconds = int(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


class ProgressLine:
    """Prints a line at most every ``interval`` seconds, and always for the first and last step."""

    def __init__(self, max_steps: int, interval: float = 5.0, unit: str = "tok") -> None:
        self.max_steps, self.interval, self.unit = max_steps, interval, unit
        self._last = 0.0
        self._started = time.monotonic()
        self._steps = 0
        self._stepping = self._refreshing = 0.0  # seconds in steps, and in their refreshes

    def show(self, row: dict[str, Any], refreshes: tuple[int, int], waiting: int = 0, remark: str = "") -> None:
        """``row``: a train row of metrics.jsonl; ``refreshes``: done and skipped; ``waiting``: due, without a
        gradient."""
        self._steps += 1
        self._stepping += row["step_seconds"]
        self._refreshing += row["refresh_seconds"]
        now = time.monotonic()
        if now - self._last < self.interval and row["step"] != self.max_steps:
            return
        self._last = now
        left = (self.max_steps - row["step"]) * (now - self._started) / self._steps
        share = self._refreshing / self._stepping
        counts = f"{refreshes[0]} (skipped {refreshes[1]}" + (f", {waiting} waiting)" if waiting else ")")
        done = f" | refreshes {counts}, {share:.1%} of the time" if refreshes[0] else ""
        done += f" | {remark}" if remark else ""
        print(
            f"step {row['step']}/{self.max_steps} | loss {row['loss']:.4f} | lr {row['lr']:.2e} | "
            f"grad norm {row['grad_norm']:.3g} | {row['tokens_per_second']:,.0f} {self.unit}/s | "
            f"{row['memory_bytes'] / 2**30:.2f} GiB{done} | ETA {human_time(left)}",
            flush=True,
        )
