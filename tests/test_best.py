"""The best checkpoint is kept and exported, and a run that no longer improves ends; all of it survives a resume."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qgalore.training.position import Position

# What is trained on says nothing about what is held out, which therefore gets worse as soon as it is learnt.
WORSENS = ("data.train=train.txt", "data.valid=valid.txt", "data.vocab_size=300", "data.sequence_length=16",
           "train.max_steps=12", "train.eval_every=2", "train.lr_schedule=constant", "train.keep_last=1",
           "train.save_every=4", "train.lr=0.02")  # fmt: skip


@pytest.fixture(autouse=True)
def texts(tiny_run):
    Path("train.txt").write_text("one two one two three " * 60)
    Path("valid.txt").write_text("Quick zebras jump, vex & mock fog-lit hyenas! " * 4)


def evaluations(run):
    rows = [json.loads(line) for line in Path(f"runs/{run}/metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row and row["step"]}


def position(run, step):
    return json.loads(Path(f"runs/{run}/checkpoints/step-{step:08d}/state.json").read_text())["position"]


def steps(run):
    return [int(path.name[5:]) for path in sorted(Path(f"runs/{run}/checkpoints").glob("step-*"))]


def test_positions_count_evaluations():
    where = Position(step=3).evaluated(float("nan"))
    assert (where.best_loss, where.best_step, where.since_best) == (None, None, 1)
    where = where.evaluated(2.0)
    assert (where.best_loss, where.best_step, where.since_best) == (2.0, 3, 0)
    for loss in (2.0, 3.0, float("inf")):
        where = where.evaluated(loss)
    assert (where.best_loss, where.best_step, where.since_best) == (2.0, 3, 3)
    assert where.evaluated(1.5).since_best == 0


def test_the_best_checkpoint_is_kept_and_exported(tiny_run):
    code, out, err = tiny_run(*WORSENS, "train.keep_best=true", "export.which=best")
    assert code == 0, err
    losses = evaluations("tiny")
    best = min(losses, key=losses.get)
    assert best < 12, "the test wants a run that gets worse"
    assert steps("tiny") == [best, 12]
    assert (position("tiny", 12)["best_step"], position("tiny", 12)["best_loss"]) == (best, losses[best])
    assert f"step-{best:08d}" in out
    last_line = out.splitlines()[-1]
    assert f"done: the exported weights are the best, of step {best} with held-out loss {losses[best]:.4f}" in last_line
    assert f"(the last: held-out loss {losses[12]:.4f}" in last_line
    exported = load_file("runs/tiny/export/hf/model.safetensors")
    kept = load_file(f"runs/tiny/checkpoints/step-{best:08d}/model.safetensors")
    last = load_file("runs/tiny/checkpoints/step-00000012/model.safetensors")
    name = "model.norm.weight"
    assert torch.equal(exported[name], kept[name].to(exported[name]))
    assert not torch.equal(kept[name], last[name])


def test_a_run_that_gets_no_better_stops_and_goes_on_where_asked(tiny_run):
    assert tiny_run(*WORSENS, "run.name=whole", "train.keep_best=true")[0] == 0
    losses = evaluations("whole")
    best = min(losses, key=losses.get)
    assert best + 4 < 12, "the test wants two evaluations after the best"
    stopping = ("run.name=cut", "train.keep_best=true", "train.early_stopping=2")
    code, out, err = tiny_run(*WORSENS, *stopping)
    assert code == 0, err
    end = best + 4
    assert f"stopped early after step {end}: 2 evaluations brought no lower held-out loss than step {best}" in out
    assert steps("cut") == [best, end]
    assert list(evaluations("cut")) == list(range(2, end + 1, 2))
    # asked again it has nothing to do, and with more patience it is the run that was never stopped
    code, out, _ = tiny_run(*WORSENS, *stopping, "--resume", "auto")
    assert code == 0
    assert "stopped early after step" in out
    assert steps("cut") == [best, end]
    code, out, err = tiny_run(*WORSENS, *stopping[:2], "train.early_stopping=50", "--resume", "auto")
    assert code == 0, err
    assert evaluations("cut") == losses
    whole, cut = (load_file(f"runs/{run}/checkpoints/step-00000012/model.safetensors") for run in ("whole", "cut"))
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())
    assert position("cut", 12) == position("whole", 12)


def test_a_best_checkpoint_that_is_gone_is_said_and_sought_anew(tiny_run):
    keep = (*WORSENS, "train.keep_best=true", "export.which=best")
    assert tiny_run(*keep)[0] == 0
    best = position("tiny", 12)["best_step"]
    shutil.rmtree(f"runs/tiny/checkpoints/step-{best:08d}")
    code, out, err = tiny_run(*keep, "--resume", "auto")
    assert code == 0, err
    assert f"the best checkpoint so far, of step {best}, is gone" in out
    assert "the last weights are exported" in out
    code, out, err = tiny_run(*keep, "train.max_steps=14", "--resume", "auto")
    assert code == 0, err
    assert position("tiny", 14)["best_step"] == 14


@pytest.mark.parametrize("value", ["train.early_stopping=0", "export.which=best"])
def test_settings_that_cannot_work_are_refused(tiny_run, value):
    assert tiny_run(value)[0] == 2
