"""What a run writes about itself: JSON-lines records, memory in use, and the progress line."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .errors import ConfigError


class Records:
    """An append-only ``.jsonl`` file whose rows carry ``step``. Its methods raise ConfigError on an I/O error."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, rows: list[dict[str, Any]]) -> None:
        if rows:
            with self._writing(), self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)

    def cut_back(self, step: int) -> None:
        """Drop the rows of steps above ``step``: a resumed run writes them again."""
        with self._writing():
            if not self.path.exists():
                return
            kept = []
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:  # the line that a killed run was writing
                    continue
                if row["step"] <= step:
                    kept.append(line)
            fresh = self.path.with_name(f"{self.path.name}.tmp")
            fresh.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
            fresh.replace(self.path)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"{self.path} cannot be written: {error}. Checkpoints so far are intact; go on with --resume auto"
            ) from error


class Silence(Records):
    """The records of a process that leaves writing to another."""

    def append(self, rows: list[dict[str, Any]]) -> None:
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

    def show(self, row: dict[str, Any], refreshes: tuple[int, int], waiting: int = 0) -> None:
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
        print(
            f"step {row['step']}/{self.max_steps} | loss {row['loss']:.4f} | lr {row['lr']:.2e} | "
            f"grad norm {row['grad_norm']:.3g} | {row['tokens_per_second']:,.0f} {self.unit}/s | "
            f"{row['memory_bytes'] / 2**30:.2f} GiB{done} | ETA {human_time(left)}",
            flush=True,
        )
