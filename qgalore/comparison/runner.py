"""Running a comparison: each job a training process of its own, in a folder of its own."""

import hashlib
import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ..convergence import records
from ..errors import ConfigError, Interrupted
from ..training.records import human_time
from .grid import Job

POLL = 0.05  # seconds between two looks at the processes
MARK = "comparison.json"  # in a run's folder: what it was started with
QUIET = ("export.formats=[]", "sample.max_new_tokens=0")


@dataclass(frozen=True)
class Failure:
    """A job that did not end well, with the last line it said."""

    job: Job
    code: int
    line: str


@dataclass
class Runner:
    """Runs jobs of one comparison. ``config``: the base file; ``shared``: overrides of all; ``train``: the command that
    trains; ``expected``: how many jobs there will be, for the time left."""

    config: Path
    shared: tuple[str, ...]
    out: Path
    train: tuple[str, ...]
    workers: int
    expected: int
    say: Callable[[str], None] = print

    def __post_init__(self) -> None:
        self.done = 0
        self.seconds: list[float] = []
        self.failures: list[Failure] = []

    def folder(self, job: Job) -> Path:
        return self.out / job.name

    def run(self, jobs: Iterable[Job]) -> None:
        """Run ``jobs``, ``workers`` at a time: finished ones are skipped, broken ones continued, failures noted and
        passed over. Raises :class:`Interrupted` on Ctrl-C, when the runs have saved their state."""
        waiting, going = list(jobs), {}
        try:
            while waiting or going:
                while waiting and len(going) < self.workers:
                    self._start(waiting.pop(0), going)
                for process in [p for p in going if p.poll() is not None]:
                    self._ended(process, *going.pop(process))
                time.sleep(POLL)
        except KeyboardInterrupt:
            for process in going:  # they have had the signal too, and save
                process.wait()
            raise Interrupted("interrupted; the same command goes on from here", signal.SIGINT) from None

    def _start(self, job: Job, going: dict) -> None:
        folder = self.folder(job)
        wanted = self._mark(job)
        if folder.exists() and (was := _read(folder / MARK)) not in (None, wanted):
            self._fail(job, 2, f"{folder} was made with other settings ({was}); delete it or choose another --out")
            return
        if folder.exists() and _finished(folder):
            self.done += 1
            self.say(f"[{self.done}/{self.expected}] {job.name}: finished before")
            return
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARK).write_text(json.dumps(wanted), encoding="utf-8")
        names = (f"run.name={job.name}", f"run.dir={self.out}")
        overrides = [*QUIET, *self.shared, *job.overrides, *names]
        command = [*self.train, "--config", str(self.config), "--resume", "auto", *overrides]
        with (folder / "output.txt").open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        going[process] = (job, time.monotonic())

    def _mark(self, job: Job) -> dict:
        base = hashlib.sha256(self.config.read_bytes()).hexdigest()[:12]
        return {"config": base, "overrides": [*self.shared, *job.overrides]}

    def _ended(self, process: subprocess.Popen, job: Job, started: float) -> None:
        seconds = time.monotonic() - started
        self.seconds.append(seconds)
        if process.returncode:
            lines = (self.folder(job) / "output.txt").read_text(encoding="utf-8", errors="replace").splitlines()
            told = [line for line in lines if line.startswith("error: ")] or [line for line in lines if line.strip()]
            self._fail(job, process.returncode, told[-1] if told else "it said nothing")
            return
        self.done += 1
        left = (self.expected - self.done) * sum(self.seconds) / len(self.seconds) / self.workers
        loss = records.read_run(self.folder(job)).evaluations[-1]["eval_loss"]
        counted = f"[{self.done}/{self.expected}] {job.name}: held-out {loss:.4f}"
        self.say(f"{counted}, {human_time(seconds)} | ETA {human_time(left)}")

    def _fail(self, job: Job, code: int, line: str) -> None:
        self.done += 1
        self.failures.append(Failure(job, code, line))
        self.say(f"[{self.done}/{self.expected}] {job.name}: failed with exit code {code}: {line}")


def _read(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _finished(folder: Path) -> bool:
    try:
        return records.read_run(folder).finished
    except ConfigError:  # nothing there yet
        return False
