"""SIGKILL at random moments, writes included: a run that is resumed each time ends with the same bits."""

import multiprocessing
import os
import random
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

KILLS = 30
STEPS = 60


def live(folder: str, arguments: list[str]) -> None:
    """One life of the run, in a process of its own."""
    import train

    os.chdir(folder)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for the rest of this process
    torch.set_num_threads(1)
    sys.exit(train.main(["--config", "tiny.yaml", f"train.max_steps={STEPS}", *arguments]))


def final_state(folder: Path) -> dict[str, torch.Tensor]:
    newest = folder / "checkpoints" / f"step-{STEPS:08d}"
    return {**load_file(newest / "model.safetensors"), **load_file(newest / "optimizer.safetensors")}


def writing(run: Path) -> bool:
    """Whether a checkpoint is half written, or was when its writer was killed."""
    return any((run / "checkpoints").glob(".*"))


@pytest.mark.slow
def test_thirty_kills_change_no_bit(tiny_run, tmp_path):
    # A server that has imported everything but computed nothing forks each life: threads do not survive a fork.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["train", "qgalore.training.assemble", "qgalore.training.loop", "bitsandbytes.optim", "test_kill"]
    )
    settings = yaml.safe_load(Path("tiny.yaml").read_text())
    settings["train"] |= {"save_every": 1, "eval_every": 20}
    settings["export"] = {"formats": []}
    Path("tiny.yaml").write_text(yaml.safe_dump(settings))

    def start(*arguments: str):
        process = context.Process(target=live, args=(str(tmp_path), list(arguments)))
        process.start()
        return process

    whole = start("run.name=whole")
    began = time.monotonic()
    whole.join()
    length = time.monotonic() - began
    assert whole.exitcode == 0
    wanted = final_state(tmp_path / "runs/whole")

    rng = random.Random(0)
    kills, number, moments = 0, 0, []
    while kills < KILLS:
        number += 1
        name = f"cut{number}"
        while True:
            process = start(f"run.name={name}", "--resume", "auto")
            process.join(rng.uniform(0.0, length) if kills < KILLS else None)
            until = time.monotonic() + (1.0 if kills % 2 else 0.0)  # every other kill waits for a write
            while process.exitcode is None and not writing(tmp_path / "runs" / name) and time.monotonic() < until:
                process.join(0.001)
            if process.exitcode is not None:
                break
            process.kill()
            process.join()
            kills += 1
            moments.append(writing(tmp_path / "runs" / name))
        assert process.exitcode == 0
        got = final_state(tmp_path / "runs" / name)
        assert got.keys() == wanted.keys()
        for key, value in wanted.items():
            assert torch.equal(value, got[key]), key
        losses = [
            [line for line in (tmp_path / "runs" / run / "metrics.jsonl").read_text().splitlines() if '"lr"' in line]
            for run in ("whole", name)
        ]
        assert len(losses[0]) == len(losses[1]) == STEPS
    assert any(moments), "no kill fell into a write: make saves longer or more frequent"
