"""Checkpoints that take longer to write than several steps: what a step pays, and what a kill in the middle costs.

python -m pytest -m slow -s tests/test_saving_slow.py
"""

import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from helpers import assert_same, final_state, rows

from qgalore.files import checkpoint, safetensors
from qgalore.training import assemble, loop

BALLAST = 240 << 20  # bytes that are saved with a tiny model, and that its steps do not touch
MOMENTS = (0.0, 0.3, 0.6, 0.9)  # of a kill, as a share of the time that writing a checkpoint takes
PAUSE, PIECE = 0.03, 20_000  # seconds before each piece of a checkpoint, and its bytes
EVERY = 4  # steps from one checkpoint to the next


def ballast(monkeypatch):
    build = assemble.build_model

    def heavy(*arguments):
        model, loss = build(*arguments)
        model.register_buffer("ballast", torch.randint(0, 255, (BALLAST,), dtype=torch.uint8))
        return model, loss

    monkeypatch.setattr(assemble, "build_model", heavy)


def seconds():
    """By the clock, and of this thread's work: on a busy machine the first hangs on others."""
    return torch.tensor([time.perf_counter(), time.thread_time()], dtype=torch.float64)


@pytest.mark.slow
def test_the_step_that_saves_pays_for_the_copy_alone(tiny_run, monkeypatch, capfd):
    """From the beginning of a step to that of the next one, all between them included; neighbours are ten on each side.
    The work is held to 10 %, the clock to the median of five checkpoints on a machine that others use too."""
    ballast(monkeypatch)
    begun, beside, copies = [], [], {}
    step, copy = loop.Loop._step, checkpoint.Draft.copy

    def noted(self):
        begun.append(seconds())
        beside.append(self.course.keeper._writing is not None)
        return step(self)

    def timed(draft):
        started = seconds()
        copied = copy(draft)
        copies[len(begun) - 1] = seconds() - started
        return copied

    monkeypatch.setattr(loop.Loop, "_step", noted)
    monkeypatch.setattr(checkpoint.Draft, "copy", timed)
    every, near = 25, [away for away in range(-10, 11) if away]
    how = ("export.formats=[]", "train.keep_last=1", f"train.save_every={every}", f"train.max_steps={6 * every}")
    how += ("train.micro_batch_size=40", "train.eval_every=1000", "lowrank.update_proj_gap=1000")
    code, _, err = tiny_run(*how)
    assert code == 0, err
    took = torch.stack(begun).diff(dim=0)
    assert len(copies) == 5
    usual = {n: torch.stack([took[n + away] for away in near]) for n in copies}
    ratios = torch.stack([(took[n] - copies[n]) / usual[n].median(dim=0).values for n in copies])
    spread = torch.cat([some / some.median(dim=0).values for some in usual.values()]).quantile(
        torch.tensor([0.1, 0.9], dtype=torch.float64), dim=0
    )
    writing = [sum(beside[n + 1 : n + 1 + every]) for n in copies]
    said = [f"steps beside a write: {writing}"]
    for what, clock in (("clock", 0), ("work", 1)):
        steps = torch.cat(list(usual.values()))[:, clock].median()
        said.append(
            f"{what}: a step takes {steps * 1e3:.0f} ms, eight of ten from {spread[0, clock]:.2f} to "
            f"{spread[1, clock]:.2f} of their median; the ones that save, without the copy: "
            f"{', '.join(f'{ratio:.2f}' for ratio in ratios[:, clock])}; the copy takes "
            f"{statistics.median(float(s[clock]) for s in copies.values()) * 1e3:.0f} ms"
        )
    with capfd.disabled():
        print("", *said, sep="\n")
    assert min(writing) >= 5
    assert ratios[:, 1].median() <= 1.1
    assert ratios[:, 0].median() <= max(1.1, spread[1, 0])


def live(folder, arguments):
    """One life of a run that writes slowly, in a process of its own."""
    import train

    os.chdir(folder)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for the rest of this process
    torch.set_num_threads(1)
    write, safetensors.PIECE = safetensors._write, PIECE

    def slowly(*what):
        time.sleep(PAUSE)
        return write(*what)

    safetensors._write = slowly
    sys.exit(train.main(["--config", "tiny.yaml", *arguments]))


def wait_for(what):
    end = time.monotonic() + 120
    while not (found := what()):
        assert time.monotonic() < end
        time.sleep(0.001)
    return found


@pytest.mark.slow
def test_a_kill_while_a_checkpoint_is_written_beside_training(tiny_run, tmp_path, capfd):
    # A server that has imported everything but computed nothing forks each life: threads do not survive a fork.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "qgalore.training.assemble", "bitsandbytes.optim", "test_saving_slow"])
    settings = yaml.safe_load(Path("tiny.yaml").read_text())
    steps = EVERY * (len(MOMENTS) + 1)
    settings["train"] |= {"save_every": EVERY, "eval_every": steps, "max_steps": steps, "keep_last": 1}
    settings["export"] = {"formats": []}
    Path("tiny.yaml").write_text(yaml.safe_dump(settings))
    assert tiny_run("run.name=whole")[0] == 0
    whole = tmp_path / "runs/whole/checkpoints" / checkpoint.name_for(steps)
    size = sum((whole / name).stat().st_size for name in checkpoint.FILES)
    kept, ahead = tmp_path / "runs/cut/checkpoints", []
    for number, moment in enumerate(MOMENTS, start=1):
        process = context.Process(target=live, args=(str(tmp_path), ["run.name=cut", "--resume", "auto"]))
        process.start()
        half_written = f".{checkpoint.name_for(EVERY * number)}.*"
        wait_for(lambda glob=half_written: list(kept.glob(glob)))
        time.sleep(moment * PAUSE * size / PIECE)
        process.kill()
        process.join()
        there = checkpoint.steps_in(kept)
        assert [checkpoint.step_of(path) for path in there] == [EVERY * (number - 1)], moment
        assert list(kept.glob(half_written)), f"{moment} was too late"
        checkpoint.read_state(there[0])
        trained = [row["step"] for row in rows(tmp_path / "runs/cut/metrics.jsonl") if "lr" in row]
        ahead.append(trained[-1] - EVERY * number)
    with capfd.disabled():
        print(f"\nsteps taken beside the write until the kill: {ahead}")
    assert max(ahead) > 0
    assert tiny_run("run.name=cut", "--resume", "auto")[0] == 0
    assert_same(final_state("runs/whole", steps), final_state("runs/cut", steps))
    assert not list(kept.glob(".*"))
