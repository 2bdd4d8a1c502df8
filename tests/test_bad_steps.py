"""Steps that fail in a run: losses and gradients that are not finite, spikes, and what there is to go back to."""

import shutil
from pathlib import Path

import pytest
import torch
from helpers import assert_same, final_state, rows
from poison import BATCH_MAJOR, Poison, PoisonedGradient, replace_loss


def test_a_loss_that_is_not_finite_is_skipped_until_it_is_hopeless(tiny_run, monkeypatch):
    Poison(monkeypatch, {2, 3, 4}, float("inf"))
    code, out, err = tiny_run("train.max_skipped_in_a_row=3")
    assert code == 4
    assert "Traceback" not in err
    assert "3 steps in a row failed" in err
    assert "Lower train.lr" in err
    assert out.count("| skipped: ") == 3
    skipped = [row for row in rows("runs/tiny/metrics.jsonl") if row.get("skipped")]
    assert [row["loss"] for row in skipped] == [None] * 3
    assert len(list(Path("runs/tiny/checkpoints").glob("step-*"))) >= 1


@pytest.mark.parametrize("extra", [(), ("train.clip_grad_norm=1.0",), ("train.order=batch_major",)])
def test_one_bad_step_leaves_the_weights_and_the_run_goes_on(tiny_run, monkeypatch, extra):
    """The run with a skipped fourth step has, after it, the weights of a run of three steps."""
    flat = ("train.lr_schedule=constant", "train.save_every=1", "train.keep_last=9", *extra)
    assert tiny_run("run.name=three", "train.max_steps=3", *flat)[0] == 0
    Poison(monkeypatch, {4}, float("nan"))
    code, out, err = tiny_run("run.name=six", *flat)
    assert code == 0, err
    assert "step 4/6 | skipped: the loss is nan" in out
    assert_same(final_state("runs/three", 3), final_state("runs/six", 4))
    losses = [row["loss"] for row in rows("runs/six/metrics.jsonl") if "lr" in row]
    assert [loss is None for loss in losses] == [False, False, False, True, False, False]


@pytest.mark.parametrize("step", [1, 6], ids=["first", "last"])
def test_a_bad_step_that_the_progress_line_would_show(tiny_run, monkeypatch, step):
    """The first and the last step are always shown; skipped, they have no loss to show."""
    Poison(monkeypatch, {step}, float("nan"))
    code, out, err = tiny_run()
    assert code == 0, err
    assert f"step {step}/6 | skipped: the loss is nan" in out


DEFERRED = (BATCH_MAJOR, "train.stepping=deferred")


def test_a_half_taken_fused_step_is_undone_by_a_replay(tiny_run, monkeypatch):
    """The fused run ends with the weights of a deferred one, which saw the bad gradient before it stepped."""
    PoisonedGradient(monkeypatch, 4)
    assert tiny_run("run.name=deferred", *DEFERRED)[0] == 0
    PoisonedGradient(monkeypatch, 4)  # on top of the first, whose call has passed
    code, out, err = tiny_run("run.name=fused", BATCH_MAJOR)
    assert code == 0, err
    assert "replaying from runs/fused/checkpoints/step-00000002 without that step" in out
    assert "step 4/6 | skipped" in out
    assert_same(final_state("runs/deferred"), final_state("runs/fused"))
    assert [row["step"] for row in rows("runs/fused/metrics.jsonl") if "lr" in row] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("bad", [1, 2])
@pytest.mark.parametrize("saving", ["null", "2"])
def test_a_half_taken_step_before_any_regular_checkpoint_is_skipped(tiny_run, monkeypatch, saving, bad):
    """It is replayed from the checkpoint of the beginning, also where only the end would be saved."""
    arguments = (f"train.save_every={saving}", "train.keep_last=9")
    PoisonedGradient(monkeypatch, bad)
    assert tiny_run("run.name=deferred", *DEFERRED, *arguments)[0] == 0
    PoisonedGradient(monkeypatch, bad)
    code, out, err = tiny_run("run.name=fused", BATCH_MAJOR, *arguments)
    assert code == 0, err
    assert "replaying from runs/fused/checkpoints/step-00000000 without that step" in out
    assert f"step {bad}/6 | skipped" in out
    train = [row for row in rows("runs/fused/metrics.jsonl") if "lr" in row]
    assert [(row["step"], row["loss"] is None) for row in train] == [(step, step == bad) for step in range(1, 7)]
    assert {row["step"] for row in rows("runs/fused/subspace.jsonl") if row["first"]} == {2 if bad == 1 else 1}
    if bad > 1:  # a bad first step leaves a deferred run the bases that its first micro-batch gave
        assert_same(final_state("runs/deferred"), final_state("runs/fused"))
    wanted = [0, 6] if saving == "null" else [0, 2, 4, 6]
    assert [int(path.name[5:]) for path in sorted(Path("runs/fused/checkpoints").glob("step-*"))] == wanted


@pytest.mark.slow
def test_the_checkpoint_of_the_beginning_is_pruned_and_resumed_like_any_other(tiny_run):
    assert tiny_run("run.name=whole")[0] == 0
    assert [p.name for p in sorted(Path("runs/whole/checkpoints").iterdir())] == ["step-00000004", "step-00000006"]
    assert tiny_run("run.name=cut", "train.keep_last=9")[0] == 0
    for step in (2, 4, 6):
        shutil.rmtree(f"runs/cut/checkpoints/step-{step:08d}")
    code, out, err = tiny_run("run.name=cut", "--resume", "auto", "train.keep_last=9")
    assert code == 0, err
    assert "step-00000000, after step 0" in out
    assert_same(final_state("runs/whole"), final_state("runs/cut"))
    assert [row["step"] for row in rows("runs/cut/metrics.jsonl") if "lr" in row] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("order", ["layer_major", "batch_major"])
def test_a_run_does_not_begin_again_beside_checkpoints_it_cannot_use(tiny_run, order):
    """All are damaged: each is named with its fault, nothing is touched, and both remedies work."""
    how = ("run.name=cut", f"train.order={order}", "export.formats=[]")
    assert tiny_run(*how)[0] == 0
    for path in Path("runs/cut/checkpoints").iterdir():
        (path / "state.json").write_text("{}")
    before = {
        path: path.read_bytes() for path in Path("runs/cut").rglob("*") if path.is_file() and path.name != ".lock"
    }
    code, _, err = tiny_run(*how, "--resume", "auto")
    assert code == 2
    for part in ("step-00000004 has checkpoint version None", "step-00000006 has", "run.name", "move runs/cut/checkp"):
        assert part in err
    assert all(path.read_bytes() == content for path, content in before.items())
    Path("runs/cut/checkpoints").rename("old")
    code, out, err = tiny_run(*how, "--resume", "auto")
    assert code == 0, err
    assert "starting from the beginning" in out
    assert [row["step"] for row in rows("runs/cut/metrics.jsonl") if "lr" in row] == [1, 2, 3, 4, 5, 6]


def test_a_checkpoint_of_a_newer_version_is_named_as_that(tiny_run):
    assert tiny_run("export.formats=[]")[0] == 0
    path = Path("runs/tiny/checkpoints/step-00000006/state.json")
    path.write_text(path.read_text().replace('"version": 3', '"version": 4'))
    code, out, err = tiny_run("--resume", "auto", "export.formats=[]")
    assert (code, "damaged" in out + err) == (2, False)
    assert "was written by a newer qgalore: its version is 4" in err
    remedy = "--resume runs/tiny/checkpoints/step-00000004"
    assert remedy in err
    code, out, err = tiny_run(*remedy.split(), "export.formats=[]")
    assert code == 0, err
    assert "left-step-00000006" in out


def test_a_rollback_goes_where_a_run_without_a_clock_would(tiny_run, monkeypatch):
    """Checkpoints that the clock asks for are no places to roll back to: they would make the weights depend on it."""
    from qgalore.training import keeping

    how = ("train.loss_spike=rollback", "train.save_every=null", "train.max_steps=28", "train.eval_every=28")
    how += ("train.lr=0.001", "export.formats=[]", "train.keep_last=1")
    Poison(monkeypatch, {25}, 10.0)
    assert tiny_run("run.name=slow", *how)[0] == 0
    hours = iter(range(0, 10**9, 300))
    monkeypatch.setattr(
        keeping.Keeper.__init__, "__kwdefaults__", {"team": keeping.ALONE, "clock": lambda: next(hours)}
    )
    Poison(monkeypatch, {25}, 10.0)
    code, out, err = tiny_run("run.name=fast", *how)
    assert code == 0, err
    assert "rolled back to runs/fast/checkpoints/step-00000000 and another data order" in out
    assert "a later checkpoint of the course left is kept as" in out
    assert_same(final_state("runs/slow", 28), final_state("runs/fast", 28))


def test_deferred_stepping_saves_no_beginning(tiny_run):
    assert tiny_run(*DEFERRED, "train.keep_last=9")[0] == 0
    assert not Path("runs/tiny/checkpoints/step-00000000").exists()


def test_a_half_taken_step_without_any_checkpoint_left_stops(tiny_run, monkeypatch):
    from qgalore.training import loop

    PoisonedGradient(monkeypatch, 2)
    real = loop.Loop._step

    def step(self):
        shutil.rmtree(self.saving.folder / "checkpoints", ignore_errors=True)
        return real(self)

    monkeypatch.setattr(loop.Loop, "_step", step)
    code, _, err = tiny_run("train.save_every=null", BATCH_MAJOR)
    assert code == 4
    assert "No usable checkpoint is left" in err


@pytest.mark.parametrize("policy", ["warn", "skip", "rollback"])
def test_a_loss_spike(tiny_run, monkeypatch, policy):
    Poison(monkeypatch, {25}, 10.0)
    code, out, err = tiny_run(
        "train.max_steps=28",
        "train.eval_every=28",
        "train.save_every=22",
        "train.lr=0.001",
        f"train.loss_spike={policy}",
    )
    assert code == 0, err
    train = [row for row in rows("runs/tiny/metrics.jsonl") if "lr" in row]
    assert [row["step"] for row in train] == list(range(1, 29))
    said = {"warn": "warning: the loss", "skip": "step 25/28 | skipped: the loss", "rollback": "rolled back to"}
    assert said[policy] in out
    assert "is a spike in step 25" in out
    assert sum(row["loss"] is None for row in train) == (policy == "skip")


def test_running_out_of_memory_shows_the_plan(tiny_run, monkeypatch):
    """A step that asks the allocator for more than any machine has, as a micro-batch too large would."""

    def wrap(real):
        def greedy(model, batch):
            torch.empty(1 << 50)
            return real(model, batch)

        return greedy

    replace_loss(monkeypatch, wrap)
    code, _, err = tiny_run()
    assert code == 3
    assert "out of memory in step 1" in err
    for part in ("planned:", "int8 weights", "measured:", "train.micro_batch_size"):
        assert part in err
