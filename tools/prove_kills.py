"""Kill processes of a job at random moments, and compare what it comes to with a job that nobody disturbed:

    python tools/prove_kills.py --out DIR [--kills 20] [--processes 2] [--seed 0] [--steps 20] [key=value …]

A small model trains under ``torchrun --max-restarts`` and saves after every step. SIGKILL ends one process of the job
in each of its lives. By turns (``--at``) this is at any moment of a life, most of which is its start; at any moment of
one of its first steps; and in a save. Steps, moments and processes are drawn. torchrun then starts all processes again,
and they go on from the newest checkpoint. A run that has come to its end is compared, and another one begins until all
kills are spent.

Compared are the bytes of every file of the last checkpoint, and the records of losses and norms. DIR/kills.json names
each kill with its step and phase. The exit code is 1 if anything differs. This is for Linux, whose /proc lists the
processes.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from qgalore.cli import arguments as kinds
from qgalore.cli import door

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "configs" / "quickstart_data"
SMALL = {
    "model.overrides.hidden_size": 64,
    "model.overrides.intermediate_size": 160,
    "model.overrides.num_hidden_layers": 2,
    "data.train": TEXT / "valid.jsonl.gz",
    "data.valid": "null",
    "data.valid_fraction": 0.02,
    "data.vocab_size": 512,
    "data.sequence_length": 32,
    "train.micro_batch_size": 1,
    "train.lr": 0.01,
    "train.warmup_steps": 2,
    "lowrank.rank": 16,
    "lowrank.update_proj_gap": 7,
}
PLACES = ("any", "step", "save")
STEPS_ON = 6  # a life is ended within so many steps after its first, so that one run has room for several kills
QUIET = {"train.eval_batches": 1, "export.formats": "[]", "sample.max_new_tokens": 0}


class JobError(RuntimeError):
    """A job that did not go as it should."""


class LateError(JobError):
    """A job that took longer than it may."""


@dataclass(frozen=True)
class Kill:
    """One process that was ended: in which run and life, which rank, after which step, and what the job was doing."""

    run: str
    life: int
    rank: int
    step: int
    phase: str
    seconds: float  # since its processes were there


def torchrun(processes: int, restarts: int, script: Path, arguments: list[str]) -> list[str]:
    """The command that starts ``script`` in so many processes of this machine."""
    many = ["--standalone", f"--nproc_per_node={processes}", f"--max-restarts={restarts}"]
    return [sys.executable, "-m", "torch.distributed.run", *many, str(script), *arguments]


def given(settings: dict[str, Any]) -> list[str]:
    """``settings`` as arguments of train.py."""
    return [f"{key}={value}" for key, value in settings.items()]


def workers(agent: int) -> dict[int, tuple[int, int]]:
    """Of each rank that torchrun, process ``agent``, runs now: its process id, and how often it was restarted."""
    found = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            if parent != agent:
                continue
            parts = (status.parent / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended meanwhile
            continue
        pairs = (part.decode(errors="replace").partition("=") for part in parts)
        environment = {name: value for name, _, value in pairs}
        if {"RANK", "TORCHELASTIC_RESTART_COUNT"} <= environment.keys():
            count = int(environment["TORCHELASTIC_RESTART_COUNT"])
            found[int(environment["RANK"])] = (int(status.parent.name), count)
    return found


def rows(run: Path) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl`` that can be read: a killed process may leave half a line."""
    path, found = run / "metrics.jsonl", []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def last_words(log: Path) -> str:
    """The end of what the processes printed, before torchrun's own report of their failure."""
    printed = re.split(r"^.*torch/distributed/elastic/", log.read_text(errors="replace"), maxsplit=1, flags=re.M)[0]
    return printed[-2000:]


def last_step(run: Path) -> int:
    return max((row["step"] for row in rows(run) if "lr" in row), default=0)


def saving(run: Path) -> bool:
    """Whether a checkpoint is half written: its folder is hidden until it is whole."""
    return any((run / "checkpoints").glob(".*"))


@dataclass
class Job:
    """A torchrun under way, which prints into ``log`` and trains the run in the folder ``run``."""

    agent: subprocess.Popen[bytes]
    run: Path
    log: Path
    processes: int
    patience: float  # seconds within which a life must begin, and the last one end

    def life(self, number: int) -> dict[int, int] | None:
        """The process ids by rank of life ``number``, which begins with 0, once all are there; None if the job has
        ended. Raises :class:`JobError` if they do not come, or if a life has ended that nobody killed."""
        until = time.monotonic() + self.patience
        while self.agent.poll() is None and time.monotonic() < until:
            found = workers(self.agent.pid)
            self._expect(found, number)
            if len(found) == self.processes and all(life == number for _, life in found.values()):
                return {rank: pid for rank, (pid, _) in found.items()}
            time.sleep(0.01)
        if self.agent.poll() is None:
            raise LateError(f"life {number} did not begin within {self.patience:.0f} s; see {self.log}")
        return None

    def end(self, number: int) -> int:
        """The exit code of the job, whose last life is ``number``. Raises :class:`JobError` as :meth:`life` does."""
        until = time.monotonic() + self.patience
        while self.goes_on(0.1):
            self._expect(workers(self.agent.pid), number)
            if time.monotonic() > until:
                raise LateError(f"life {number} did not end within {self.patience:.0f} s; see {self.log}")
        return self.agent.returncode

    def _expect(self, found: dict[int, tuple[int, int]], number: int) -> None:
        if any(life > number for _, life in found.values()):
            raise JobError(f"life {number} failed, and nobody had killed a process of it; see {self.log}")

    def goes_on(self, seconds: float) -> bool:
        """Whether the job still runs after so many seconds."""
        try:
            self.agent.wait(seconds)
        except subprocess.TimeoutExpired:
            return True
        return False

    def wait_for(self, what: Callable[[Path], bool], seconds: float, pause: float = 0.0005) -> bool:
        """Whether ``what(run)`` came true within so many seconds, while the job ran; looked at after each pause."""
        until = time.monotonic() + seconds
        while not (true := what(self.run)) and time.monotonic() < until and self.agent.poll() is None:
            time.sleep(pause)
        return true

    def steps(self, printed: int) -> bool:
        """Whether a life has taken a step, before which ``log`` had so many bytes."""
        return b"| loss " in self.log.read_bytes()[printed:]

    def kill(self, rank: int, pid: int) -> bool:
        """End a process with SIGKILL. False if it had left by itself, for it had come to its end."""
        if workers(self.agent.pid).get(rank, (0, 0))[0] != pid:
            return False
        os.kill(pid, signal.SIGKILL)
        return True


@contextmanager
def started(command: list[str], run: Path, log: Path, processes: int, patience: float) -> Iterator[Job]:
    """The job of ``command``. It and its processes are gone afterwards."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as printed:
        agent = subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT)
    try:
        yield Job(agent, run, log, processes, patience)
    finally:
        if agent.poll() is None:
            left = [pid for pid, _ in workers(agent.pid).values()]
            agent.kill()
            agent.wait()
            for pid in left:  # its own children, which nobody has waited for
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@dataclass(frozen=True)
class Length:
    """Seconds of a life that nobody disturbs, and of one of its steps with a save."""

    whole: float
    step: float


def aim(job: Job, printed: int, length: Length, where: str, rng: random.Random) -> None:
    """Wait for a moment of the life that began when ``log`` had so many bytes. ``where``: one of :data:`PLACES`."""
    if where == "any":
        job.goes_on(rng.uniform(0.0, length.whole))
        return
    job.wait_for(lambda run: job.steps(printed), job.patience)
    target = last_step(job.run) + rng.randrange(STEPS_ON)
    job.wait_for(lambda run: last_step(run) >= target, job.patience, 0.005)
    if where == "step":
        job.goes_on(rng.uniform(0.0, length.step))
    else:
        job.wait_for(saving, 1.0)
        job.goes_on(rng.uniform(0.0, 0.01))


def disturbed(job: Job, length: Length, places: Sequence[str], rng: random.Random) -> tuple[int, list[Kill]]:
    """The exit code of a job, and its kills: one in each of ``places``, unless it ends before they are spent."""
    kills: list[Kill] = []
    while len(kills) < len(places) and (pids := job.life(len(kills))) is not None:
        life, began, printed = len(kills), time.monotonic(), job.log.stat().st_size
        aim(job, printed, length, places[life], rng)
        rank = rng.choice(sorted(pids))
        if not job.kill(rank, pids[rank]):
            break
        what = "save" if saving(job.run) else "step" if job.steps(printed) else "start"
        seconds = round(time.monotonic() - began, 3)
        kills.append(Kill(job.run.parent.name, life, rank, last_step(job.run), what, seconds))
        print(kills[-1], flush=True)
    return job.end(len(kills)), kills


def undisturbed(command: list[str], run: Path, log: Path, processes: int, patience: float) -> Length:
    """How long a job's only life is, which must end within ``patience`` seconds. Raises :class:`JobError` with the end
    of what it printed if it fails."""
    until = time.monotonic() + patience
    with started(command, run, log, processes, patience) as job:
        job.life(0)
        began = time.monotonic()
        job.patience = until - began
        job.wait_for(lambda run: job.steps(0), patience, 0.005)
        first, stepping = last_step(run), time.monotonic()
        job.patience = until - stepping
        code, ended = job.end(0), time.monotonic()
        if code:
            raise JobError(f"the job ended with {code}; {log}:\n{last_words(log)}")
        return Length(ended - began, (ended - stepping) / max(1, last_step(run) - first))


def differences(wanted: Path, found: Path) -> list[str]:
    """What differs between the last checkpoints and the losses of two runs."""
    ends = [max((run / "checkpoints").glob("step-*")) for run in (wanted, found)]
    names = [{str(path.relative_to(end)) for path in end.rglob("*") if path.is_file()} for end in ends]
    if ends[0].name != ends[1].name or names[0] != names[1]:
        return [f"{ends[0]} and {ends[1]} do not hold the same files"]
    told = [name for name in sorted(names[0]) if contents(ends[0] / name) != contents(ends[1] / name)]
    kept = [
        [(row["step"], row["loss"], row["lr"], row["grad_norm"]) for row in rows(run) if "lr" in row]
        for run in (wanted, found)
    ]
    return told + (["losses or norms in metrics.jsonl"] if kept[0] != kept[1] else [])


def contents(path: Path) -> Any:
    """All bytes of a file; of state.json what does not name the run, its day or itself."""
    if path.name != "state.json":
        return path.read_bytes()
    state = json.loads(path.read_text(encoding="utf-8"))
    config = {key: value for key, value in state["config"].items() if key != "run"}
    return {key: value for key, value in state.items() if key not in ("sha256", "day")} | {"config": config}


def command(options: argparse.Namespace, run: Path, restarts: int) -> list[str]:
    """Train the small model into ``run``, from its newest checkpoint on."""
    settings = {"device": options.device, "data.cache_dir": options.out / "cache", **SMALL, **QUIET}
    settings |= {"train.grad_accumulation": 2 * options.processes, "train.max_steps": options.steps}
    settings |= {"train.save_every": 1, "train.eval_every": options.steps}
    settings |= {"run.dir": run.parent, "run.name": run.name}
    arguments = ["--config", "quickstart.yaml", *given(settings), *options.overrides, "--resume", "auto"]
    return torchrun(options.processes, restarts, ROOT / "train.py", arguments)


def prove(options: argparse.Namespace) -> int:
    rng, out = random.Random(options.seed), options.out
    whole, runs, kills, faults = out / "whole" / "run", 0, [], []
    length = undisturbed(command(options, whole, 0), whole, out / "whole.log", options.processes, 300)
    print(f"a life takes {length.whole:.1f} s, and a step with its save {length.step:.2f} s", flush=True)
    while len(kills) < options.kills and not faults:
        runs += 1
        run, log = out / f"cut{runs}" / "run", out / f"cut{runs}.log"
        left = [options.at[number % len(options.at)] for number in range(len(kills), options.kills)]
        # torchrun gives processes that wait for a dead one 30 seconds to leave
        restarts, patience = len(left), 90 + 10 * length.whole
        with started(command(options, run, restarts), run, log, options.processes, patience) as job:
            code, new = disturbed(job, length, left, rng)
        kills += new
        faults = differences(whole, run) if code == 0 else [f"it ended with {code}; see {log}"]
        print(f"{run.parent.name}: {len(new)} kills, {faults or 'the same bits'}", flush=True)
    phases = dict(Counter(kill.phase for kill in kills))
    found = {"kills": [asdict(kill) for kill in kills], "phases": phases, "runs": runs, "differences": faults}
    (out / "kills.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(f"{len(kills)} kills in {runs} runs, by phase {phases}: {faults or 'all ended with the same bits'}")
    return 1 if faults else 0


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="a new folder for the runs")
    parser.add_argument("--kills", type=kinds.whole(1), default=20)
    parser.add_argument("--processes", type=kinds.whole(2), default=2)
    parser.add_argument("--steps", type=kinds.whole(1), default=20, help="of each run")
    parser.add_argument("--seed", type=kinds.whole(0), default=0, help="of the moments and the ranks")
    parser.add_argument("--at", nargs="+", choices=PLACES, default=list(PLACES), help="where, by turns")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as parallel=shard")
    options = parser.parse_intermixed_args(arguments)
    options.out = options.out.resolve()
    if options.out.exists() and any(options.out.iterdir()):
        parser.error(f"--out: {options.out} is not empty; give a new folder")
    return prove(options)


if __name__ == "__main__":
    sys.exit(door.leave(lambda: main(sys.argv[1:])))
