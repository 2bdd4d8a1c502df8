"""Train on two or more GPUs for a few minutes, and set what several cards do beside what one does and beside the plan:

    python tools/prove_cards.py --out DIR [--only shard killed …] [--minutes 10]
    python tools/prove_cards.py --out DIR --device cpu --processes 2      # the same on a tiny model, over gloo

Each case is a run of train.py under torchrun in a process for each card, with four micro-batches each. The cases run in
the order of their worth, each within its own time and all within ``--minutes``. DIR/cards.json and the table
DIR/cards.txt are written after each, and checkpoints are deleted. The same command again goes on with what is missing.

``one`` trains a small model in one process, in fp32 and without rounding, and others must have its losses. They differ
by the order of sums alone: of as many terms as a step has micro-batches, each with an error of 2⁻²⁴, in both runs. Once
updates hang on them, a hundred times that is allowed, and 1e-3 for muon. Norms of gradients may differ by 1 %.

``killed`` ends a process with SIGKILL, and the last checkpoint must have the bits of an unbroken run. ``resharded``
goes on from a checkpoint in half as many processes, then in one, which exports, then in all again. ``7b`` trains LLaMA
7B, if cards and disk have room. Checkpoints are written beside training wherever the product does so by itself.

Columns: ``differs`` is the largest difference of a loss from one process's, relative, and what is allowed. Seconds and
tokens are medians over later steps. ``allocated`` (of the worst card; of all Python on a CPU) stands beside the plan's
tensors, and ``sent`` in one step, on average of the processes, beside the plan's. The exit code is 1 if a case failed.
"""

import argparse
import random
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import prove_cards_rows as tables
import prove_kills as jobs

from qgalore.cli import arguments as kinds
from qgalore.cli import door
from qgalore.errors import ConfigError

QUICK, LLAMA = "quickstart.yaml", "llama7b_16gb.yaml"
MICRO_BATCHES = 4  # of each process in a step
MINUTES = 10.0
STEPS = 12
COUNTED = 8  # the step whose collectives are counted
LARGE_STEPS = 5
LARGE_DISK = 30 << 30  # two checkpoints of LLaMA 7B, and some

EXACT = {"method": "galore", "train.optimizer": "adamw", "model.dtype": "float32", "lowrank.rank": 16}
RULES = {"galore": {}, "muon": {"lowrank.rule": "muon", "lowrank.momentum": "fp32"}}
ON_GPU = {  # the small model of a GPU is the quickstart's
    "model.overrides.hidden_size": 256,
    "model.overrides.intermediate_size": 704,
    "model.overrides.num_hidden_layers": 5,
    "data.sequence_length": 128,
}
NO_REFRESH = {"lowrank.update_proj_gap": 10_000}  # after the first step, so that an ordinary step is counted
LARGE = {"train.max_steps": LARGE_STEPS, "train.eval_every": LARGE_STEPS, "memory.budget": "null"}


@dataclass(frozen=True)
class Case:
    """``kind`` chooses the function that runs it, ``how`` is the value of ``parallel``, and it takes at most so many
    ``seconds``, or more with more ``--minutes``. ``needs``: the least number of processes, and whether it is even."""

    kind: str
    how: str
    seconds: int
    rule: str = "galore"
    needs: tuple[int, bool] = (2, False)


MESH = (4, True)
CASES = {
    "one": Case("alone", "replicate", 90),
    "replicate": Case("beside", "replicate", 90),
    "shard": Case("beside", "shard", 90),
    "mesh": Case("beside", "mesh", 90, needs=MESH),
    "killed": Case("killed", "shard", 180),
    "resharded": Case("resharded", "shard", 200),
    "7b-shard": Case("large", "shard", 200),
    "7b-replicate": Case("large", "replicate", 200),
    "one-muon": Case("alone", "replicate", 60, "muon"),
    "replicate-muon": Case("beside", "replicate", 60, "muon"),
    "shard-muon": Case("beside", "shard", 60, "muon"),
    "mesh-muon": Case("beside", "mesh", 60, "muon", MESH),
    "killed-replicate": Case("killed", "replicate", 120),
}


@dataclass(frozen=True)
class Place:
    """Where and with what the cases run, and the ``time.monotonic()`` at which the current one must have ended."""

    out: Path
    device: str
    processes: int
    ends: float
    times: float = 1.0  # how many times as long as in ten minutes a case may take

    @property
    def left(self) -> float:
        return self.ends - time.monotonic()

    def settings(self, name: str, case: Case, processes: int, **changes: Any) -> dict[str, Any]:
        """The keys of a run of the small model; the batch is that of all cards whatever ``processes`` there are."""
        base = {**jobs.SMALL, **jobs.QUIET, **(ON_GPU if self.device == "cuda" else {}), **RULES[case.rule]}
        base |= {"device": self.device, "data.cache_dir": self.out / "cache", "run.dir": self.out / name}
        base |= {"train.grad_accumulation": MICRO_BATCHES * self.processes, "train.lr_schedule": "constant"}
        base |= {"train.max_steps": STEPS, "train.eval_every": STEPS, "train.keep_last": 1}
        base |= {"parallel": parallel(case.how, processes)}
        return base | changes


def parallel(how: str, processes: int) -> str:
    return f"{{replicate: {processes // 2}, shard: 2}}" if how == "mesh" else how


def train(place: Place, settings: dict[str, Any], processes: int, config: str = QUICK, count: int = 0) -> Path:
    """The folder of a run that has ended well; what its processes counted in step ``count`` lies beside it. Raises
    :class:`jobs.JobError`."""
    run = settings["run.dir"] / settings.setdefault("run.name", "run")
    script, arguments = jobs.ROOT / "train.py", ["--config", config, *jobs.given(settings), "--resume", "auto"]
    if count:
        script = jobs.ROOT / "tools" / "prove_cards_worker.py"
        arguments = [str(run.parent / "counted"), str(count), *arguments]
    command = jobs.torchrun(processes, 0, script, arguments)
    jobs.undisturbed(command, run, run.with_suffix(".log"), processes, place.left)
    return run


def alone(place: Place, name: str, case: Case) -> dict[str, Any]:
    """The small model in one process: the losses that others are held to."""
    return small(place, name, case, 1)[1]


def beside(place: Place, name: str, case: Case) -> dict[str, Any]:
    """The small model in all processes."""
    run, found = small(place, name, case, place.processes)
    return found | held_to_one(place, run, case)


def small(place: Place, name: str, case: Case, processes: int) -> tuple[Path, dict[str, Any]]:
    settings = place.settings(name, case, processes, **EXACT, **NO_REFRESH)
    run = train(place, settings, processes, count=COUNTED)
    return run, tables.figures(run, processes, COUNTED)


def held_to_one(place: Place, run: Path, case: Case) -> dict[str, Any]:
    """The losses of a run beside those of one process; a wrong one is a fault."""
    name = "one" if case.rule == "galore" else f"one-{case.rule}"
    known = tables.known(place.out)
    wanted = known.get(name, {}).get("losses")
    if wanted is None:
        raise jobs.JobError(f"the case {name} has no losses to compare with; run it too")
    sums = MICRO_BATCHES * place.processes * 2.0**-24
    allowed = {"first": 2 * sums, "later": 200 * sums if case.rule == "galore" else 1e-3}
    found = tables.column(run, "loss")
    if len(found) != len(wanted):
        raise jobs.JobError(f"{run} has {len(found)} losses, and one process has {len(wanted)}")
    apart = [abs(a - b) / abs(a) for a, b in zip(wanted, found, strict=True)]
    limits = [allowed["first"] if step == 0 else allowed["later"] for step in range(len(apart))]
    faults = [f"loss of step {n + 1}" for n, (x, most) in enumerate(zip(apart, limits, strict=True)) if not x <= most]
    pairs = zip(known[name]["norms"], tables.column(run, "grad_norm"), strict=True)
    faults += [f"norm of step {n + 1}" for n, (a, b) in enumerate(pairs) if not abs(a - b) <= 1e-2 * a]
    return {"differs": apart, "allowed": allowed, "faults": faults}


def killed(place: Place, name: str, case: Case) -> dict[str, Any]:
    """A run of which one process is killed, and started again by torchrun, beside one that nobody disturbed. Where
    their bits differ, a second one that nobody disturbed tells whether that is due to the kill."""
    changes = {"train.save_every": 1, "run.deterministic": str(place.device == "cuda").lower()}
    settings = place.settings(name, case, place.processes, **changes)
    whole = train(place, settings | {"run.name": "whole"}, place.processes)
    cut, told = interrupted(place, settings | {"run.name": "cut"})
    faults = jobs.differences(whole, cut)
    if not faults:
        return {"killed": told, "note": "the same bits as unbroken"}
    again = jobs.differences(whole, train(place, settings | {"run.name": "twin"}, place.processes))
    if not again:
        return {"killed": told, "faults": faults}
    return {"killed": told, "note": f"not told: two unbroken runs differ as well ({len(again)} files)"}


def interrupted(place: Place, settings: dict[str, Any]) -> tuple[Path, dict[str, int]]:
    """The folder of a run that has ended well after one of its processes was killed, and which that was."""
    run = settings["run.dir"] / settings["run.name"]
    log, rank = run.with_suffix(".log"), random.Random(0).randrange(place.processes)
    arguments = ["--config", QUICK, *jobs.given(settings), "--resume", "auto"]
    command = jobs.torchrun(place.processes, 1, jobs.ROOT / "train.py", arguments)
    with jobs.started(command, run, log, place.processes, place.left) as job:
        pids = job.life(0)
        halfway = pids is not None and job.wait_for(lambda run: jobs.last_step(run) >= STEPS // 2, place.left, 0.005)
        if pids is None or not halfway or not job.kill(rank, pids[rank]):
            raise jobs.JobError(f"the job ended before it was killed; see {log}")
        step, job.patience = jobs.last_step(run), place.left
        if code := job.end(1):
            raise jobs.JobError(f"the job ended with {code} after a kill; see {log}")
    return run, {"rank": rank, "after_step": step}


def resharded(place: Place, name: str, case: Case) -> dict[str, Any]:
    """One run that several numbers of processes take turns at; one process exports what the others have saved."""
    many, unlike = place.processes, []
    turns = [many, *([many // 2] if many > 3 else []), 1, many]
    run = place.out
    for number, processes in enumerate(turns, start=1):
        steps = {"train.max_steps": STEPS * number // len(turns)}
        exports = {"export.formats": "[hf]"} if processes == 1 else {}
        run = train(place, place.settings(name, case, processes, **EXACT, **NO_REFRESH, **steps, **exports), processes)
        if exports:
            unlike = tables.unlike_the_checkpoint(run)
    found = held_to_one(place, run, case)
    return found | {"turns": turns, "faults": found["faults"] + unlike, "note": f"in turn in {turns} processes"}


def large(place: Place, name: str, case: Case) -> dict[str, Any]:
    """LLaMA 7B for a few steps."""
    run = train(place, large_settings(place, name, case), place.processes, LLAMA, LARGE_STEPS - 1)
    return tables.figures(run, place.processes, LARGE_STEPS - 1)


def large_settings(place: Place, name: str, case: Case) -> dict[str, Any]:
    settings = place.settings(name, case, place.processes, **LARGE, **NO_REFRESH)
    text = settings["data.train"]
    settings |= {"data.sequence_length": 2048, "data.tokenizer": "null", "data.valid": text, "train.lr": 0.001}
    own = ("model.", "lowrank.rank", "data.valid_fraction")  # what the configuration itself says
    return {key: value for key, value in settings.items() if not key.startswith(own)}


RUN: dict[str, Callable[[Place, str, Case], dict[str, Any]]] = {
    "alone": alone,
    "beside": beside,
    "killed": killed,
    "resharded": resharded,
    "large": large,
}


def left_out(place: Place, case: Case) -> str | None:
    """Why a case cannot run here; None if it can."""
    least, even = case.needs
    if place.processes < least or (even and place.processes % 2):
        return f"needs {'an even number of ' if even else ''}{least} or more processes"
    if case.kind != "large":
        return None
    if place.device == "cpu":
        return "needs GPUs"
    import torch

    smallest = min(torch.cuda.get_device_properties(n).total_memory for n in range(place.processes))
    if smallest < 15.5 * 2**30:
        return f"needs cards of 16 GB, and one has {smallest / 2**30:.1f} GiB"
    free = shutil.disk_usage(place.out).free
    return None if free > LARGE_DISK else f"needs {LARGE_DISK >> 30} GiB of disk, and {free / 2**30:.1f} are free"


def outcome(place: Place, name: str) -> dict[str, Any]:
    """The row of a case, in which its faults are named. It raises nothing that a run may cause."""
    case, began = CASES[name], time.monotonic()
    if (why := left_out(place, case)) is not None:
        return {"status": "left out", "note": why}
    shutil.rmtree(place.out / name, ignore_errors=True)  # of a try that ended early
    try:
        ends = min(place.ends, began + place.times * case.seconds)
        found = RUN[case.kind](replace(place, ends=ends), name, case)
        found |= {"status": "differs" if found.get("faults") else "passed"}
    except jobs.LateError as error:
        found = {"status": "out of time", "note": str(error)}
    except jobs.JobError as error:
        refused = tables.refusal(place.out / name)
        found = {"status": "refused", "note": refused} if refused else {"status": "failed", "note": str(error)}
    for kind in ("checkpoints", "export"):
        for folder in (place.out / name).glob(f"*/{kind}"):
            shutil.rmtree(folder)
    return found | {"seconds": round(time.monotonic() - began, 1)}


def prove(place: Place, names: list[str]) -> int:
    machine = tables.machine(place.device, place.processes)
    rows = {"machine": machine, **tables.known(place.out)}
    if rows["machine"] != machine:
        raise ConfigError(f"{place.out} is of {rows['machine']}, and here is {machine}. Give a new folder as --out")
    for name in names:
        if rows.get(name, {}).get("status") in ("passed", "differs", "refused"):
            print(f"{name}: done before", flush=True)
            continue
        print(f"{name} …", flush=True)
        rows[name] = outcome(place, name) if place.left > 0 else {"status": "not reached"}
        tables.write(place.out, rows)
        print(f"{name}: {rows[name]['status']}", flush=True)
    print(f"\n{tables.table(rows)}")
    bad = [name for name in names if rows[name]["status"] not in ("passed", "refused", "left out")]
    if bad:
        print(f"error: did not pass: {', '.join(bad)}; see {place.out}/cards.json and the logs", file=sys.stderr)
    return 1 if bad else 0


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="a folder for the runs, new or of a try before")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--processes", type=kinds.whole(2), help="one for each card (all cards; 2 on a CPU)")
    parser.add_argument("--only", nargs="+", choices=tuple(CASES), default=list(CASES))
    parser.add_argument("--minutes", type=kinds.real(0.0, 1e6), default=MINUTES, help="after which nothing goes on")
    options = parser.parse_args(arguments)
    ends, cards = time.monotonic() + options.minutes * 60, 0
    if options.device == "cuda":
        import torch

        cards = torch.cuda.device_count()
        if cards < (options.processes or 2):
            parser.error(f"PyTorch sees {cards} GPUs, and {options.processes or 2} are needed; --device cpu needs none")
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    times = max(1.0, options.minutes / MINUTES)
    place = Place(out, options.device, options.processes or cards or 2, ends, times)
    return prove(place, [name for name in CASES if name in options.only])


if __name__ == "__main__":
    sys.exit(door.leave(lambda: main(sys.argv[1:])))
