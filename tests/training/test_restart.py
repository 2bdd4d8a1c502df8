"""A new schedule or new data on a checkpoint's weights: what is taken over, what begins anew, what may not change."""

import json
import shutil
from pathlib import Path

import pytest

from qgalore.data.tokenizer import load_tokenizer
from tests.helpers import assert_same, final_state, rows

FIXED = (
    "lowrank.policy=fixed",
    "lowrank.update_proj_gap=3",
    "train.save_every=1",
    "train.keep_last=9",
    "export.formats=[]",
)
ANEW = ("train.restart_schedule=true", "train.lr_schedule=constant", "train.lr=0.004", "train.warmup_steps=2")
PATH = "runs/tiny/checkpoints/step-00000004"
FROM = ("--resume", PATH)
_KEPT: list[Path] = []


@pytest.fixture
def run(tiny_run, tmp_path_factory):
    """A function (overrides…) → what ``train.py`` gives, beside a run "tiny" of four steps, trained once for all."""
    if not _KEPT:
        code, _, err = tiny_run(*FIXED, "train.max_steps=4")
        assert code == 0, err
        _KEPT.append(tmp_path_factory.mktemp("restart") / "runs")
        shutil.copytree("runs", _KEPT[0])
    shutil.copytree(_KEPT[0], "runs", dirs_exist_ok=True)
    return lambda *more: tiny_run(*FIXED, *more)


def state_of(name, step):
    return json.loads(Path(f"runs/{name}/checkpoints/step-{step:08d}/state.json").read_text())


def refreshed(name, after=0):
    """(step, layer) of every refresh of a run, counted from the step ``after``."""
    return [(row["step"] - after, row["layer"]) for row in rows(f"runs/{name}/subspace.jsonl") if row["step"] > after]


def test_weights_and_moments_are_taken_and_the_rest_begins_anew(run):
    code, out, err = run("run.name=b", *ANEW, *FROM, "train.max_steps=5", "train.weight_decay=0.1")
    assert code == 0, err
    assert f"taken from {PATH}: weights, moments, bases and their schedules, after 4 steps" in out
    assert "new from step 0: the learning rate with its warm-up, the data and its order, losses and the best" in out
    assert "train.lr: 0.01 → 0.004" in out
    assert_same(final_state("runs/tiny", 4), final_state("runs/b", 0))  # the beginning, before the first step
    steps = [row for row in rows("runs/b/metrics.jsonl") if "lr" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5]
    assert [row["lr"] for row in steps] == pytest.approx([0.004 / 3, 0.008 / 3, 0.004, 0.004, 0.004])
    assert steps[0]["tokens"] == next(row for row in rows("runs/tiny/metrics.jsonl") if "lr" in row)["tokens"]
    state = state_of("b", 5)
    assert (state["optimizer"]["step_count"], state["position"]["steps_before"]) == (9, 4)
    assert (state["position"]["step"], len(state["position"]["losses"])) == (5, 5)
    assert [group["weight_decay"] for group in state["optimizer"]["groups"]] == [0.1, 0.1, 0.0]

    # Bases are refreshed when they would have been in a run that was not interrupted, numbered from the new beginning.
    assert run("run.name=whole", "train.max_steps=9")[0] == 0
    assert refreshed("b") == refreshed("whole", after=4)
    assert len({step for step, _ in refreshed("b")}) > 2


@pytest.mark.parametrize(
    "again", [ANEW, pytest.param(ANEW[1:], marks=pytest.mark.slow)], ids=["said again", "not said again"]
)
def test_a_restarted_run_goes_on_like_any_other(run, again):
    """Stopped in the middle, and resumed from its own checkpoint, it does not begin anew."""
    texts = [json.dumps({"text": f"{n} ships on the sea of the night " * 12}) + "\n" for n in range(40)]
    Path("other.jsonl").write_text("".join(texts))
    other = ("run.name=b", "data.train=other.jsonl", "data.valid=other.jsonl", "train.eval_every=4")
    code, out, err = run(*other, *ANEW, *FROM, "train.max_steps=4")
    assert code == 0, err
    assert "that of the run before, " in out
    unbroken, metrics = final_state("runs/b", 4), [row["loss"] for row in rows("runs/b/metrics.jsonl") if "lr" in row]
    shutil.rmtree("runs/b")
    assert run(*other, *ANEW, *FROM, "train.max_steps=2")[0] == 0
    shutil.rmtree("runs/tiny")  # no longer needed
    shutil.move("runs", "moved")
    code, out, err = run(*other, *again, "run.dir=moved", "--resume", "auto", "train.max_steps=4")
    assert code == 0, err
    assert "moved/b/checkpoints/step-00000002, after step 2" in out
    assert "taken from" not in out
    assert_same(unbroken, final_state("moved/b", 4))
    assert [row["loss"] for row in rows("moved/b/metrics.jsonl") if "lr" in row] == metrics
    assert "restart_schedule: true" in Path("moved/b/config.yaml").read_text()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("lowrank.rank=8", *FROM), ["lowrank.rank: 16 → 8", "begin from the run's export with model.path"]),
        (("lowrank.weight_format=none", *FROM), ["lowrank.weight_format: 'int8' → 'none'"]),
        (("lowrank.update_proj_gap=5", *FROM), ["lowrank.update_proj_gap: 3 → 5"]),
        (("train.optimizer=adamw", *FROM), ["train.optimizer: 'adamw8bit' → 'adamw'"]),
        (("method=adamw", *FROM), ["method: 'qgalore' → 'adamw'"]),
        (("model.config=llama_60m", *FROM), ["model.config: 'llama_quickstart' → 'llama_60m'"]),
        (("data.added_tokens=['<x>']", *FROM), ["data.added_tokens: [] → ['<x>']"]),
        (("model.overrides.num_hidden_layers=3", *FROM),
         ["cannot be used: the checkpoint has no tensor model.layers.2"]),
        (("lowrank.rule=muon", "run.seed=1", *FROM), ["lowrank.rule: 'galore' → 'muon'", "run.seed: 0 → 1"]),
        (("data.tokenizer=another", *FROM),
         ["the tokenizer is not that of the run that made", "Leave data.tokenizer out"]),
        ((), ["there is no checkpoint to begin from; add --resume"]),
        (("--resume", "auto"), ["holds no checkpoint to go on from. Say --resume RUN/checkpoints/step-…"]),
        (("run.name=tiny", "--resume", "auto"), ["is this run's own checkpoint, which it goes on from"]),
        (("run.name=tiny", *FROM), ["choose another run.name and say --resume " + PATH]),
    ],
    ids=lambda value: " ".join(value[:1]) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_what_is_refused(run, more, said):
    if "data.tokenizer=another" in more:
        shutil.copytree("runs/tiny/tokenizer", "another")
        other = load_tokenizer("another")
        other.add_tokens(["of no text"])
        other.save_pretrained("another")
    code, _, err = run("run.name=b", "train.restart_schedule=true", *more)
    assert code == 2
    for part in said:
        assert part in err
    assert not Path("runs/b").exists()


@pytest.mark.slow
def test_another_seed_and_batch_and_overrides(run):
    """What is about neither shapes nor formats may change with the schedule; dropout needs another way of attending."""
    changed = ("run.seed=3", "train.micro_batch_size=2", "train.grad_accumulation=2", "data.sequence_length=16")
    code, out, err = run(
        "run.name=b", *ANEW, *FROM, *changed, "model.overrides.attention_dropout=0.1", "train.max_steps=1"
    )
    assert code == 0, err
    for said in ("run.seed: 0 → 3", "data.sequence_length: 32 → 16", "model.overrides.attention_dropout: None → 0.1"):
        assert said in out


@pytest.mark.slow
@pytest.mark.parametrize("order", ["batch_major", "layer_major"])
def test_a_step_that_is_taken_again_is_the_same(run, order, monkeypatch):
    """A restarted run that goes back to its checkpoint counts its steps, and the optimizer's, as it did."""
    from qgalore.training import recovery

    assert run("run.name=b", *ANEW, *FROM, f"train.order={order}", "train.max_steps=4")[0] == 0
    guarded, failed = recovery.Recovery.guarded, []

    def once(self, *how):
        if self.course.position.step == 2 and not failed:
            failed.append(self.course.keeper.newest())
            path, state, _ = failed[0]
            self.course.return_to(path, state)
            return None
        return guarded(self, *how)

    monkeypatch.setattr(recovery.Recovery, "guarded", once)
    assert run("run.name=c", *ANEW, *FROM, f"train.order={order}", "train.max_steps=4")[0] == 0
    assert failed
    assert_same(final_state("runs/b", 4), final_state("runs/c", 4))
    assert refreshed("b") == refreshed("c")
