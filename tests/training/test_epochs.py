"""The length of a run in epochs and of its warm-up as a share: what they come to, what is kept, how a run goes on."""

import json
from pathlib import Path

import pytest
import yaml
from helpers import assert_same, final_state, rows

from qgalore import config
from qgalore.convergence.records import read_run
from qgalore.errors import ConfigError

LEAST = {"model": {"config": "llama_60m"}, "data": {"train": "x.txt"}, "train": {"lr": 0.01}}
TEXT = ("data.train=train.txt", "data.vocab_size=300", "data.sequence_length=16", "data.valid_fraction=0.2")
SHORT = (*TEXT, "export.formats=[]", "sample.max_new_tokens=0", "train.eval_every=50", "train.save_every=50")
EPOCHS = (*SHORT, "train.max_steps=null", "train.warmup_steps=0", "train.warmup_ratio=0.001")


def parsed(**train):
    return config.parse({**LEAST, "train": {**LEAST["train"], **train}}, "here")


@pytest.mark.parametrize(
    ("epochs", "samples", "per_step", "steps"),
    [
        (1, 40, 8, 5),
        (1, 41, 8, 6),
        (2.5, 16, 8, 5),
        (0.1, 30, 1, 3),
        (0.3, 10, 1, 3),
        (0.001, 5, 8, 1),
        (1.1, 10, 1, 11),
    ],
)
def test_a_part_of_a_step_is_a_whole_one(epochs, samples, per_step, steps):
    """0.1 · 30 and 1.1 · 10 are more than 3 and 11 as floating-point numbers, and still are 3 and 11 steps."""
    made = parsed(epochs=epochs, micro_batch_size=per_step)
    assert config.steps_of(made.train, samples) == steps
    assert config.with_steps(made, samples).train.steps == steps
    halved = parsed(epochs=epochs, micro_batch_size=per_step, grad_accumulation=2)
    assert config.steps_of(halved.train, samples) == -(-steps // 2)


@pytest.mark.parametrize(("ratio", "warmup"), [(0, 0), (0.1, 3), (0.11, 4), (1, 30)])
def test_warm_up_is_a_share_of_all_steps(ratio, warmup):
    made = config.with_steps(parsed(max_steps=30, warmup_ratio=ratio), 1)
    assert (made.train.steps, made.train.warmup_steps) == (30, warmup)
    assert config.with_steps(parsed(max_steps=30, warmup_steps=7), 1).train.warmup_steps == 7


def test_what_was_asked_for_is_written_down():
    for asked in ({"epochs": 2.5, "warmup_ratio": 0.1}, {"epochs": 1, "warmup_steps": 3}, {"max_steps": 9}):
        made = config.with_steps(parsed(**asked), 100)
        again = config.parse(yaml.safe_load(config.dump(made)), "dump")
        assert again == parsed(**asked)
        assert config.differences(parsed(**asked).model_dump(mode="json"), made) == []


@pytest.mark.parametrize(
    ("train", "told"),
    [
        ({}, "neither train.max_steps nor train.epochs is given; add one, for example train.max_steps=1000"),
        ({"max_steps": 5, "epochs": 2}, r"both train.max_steps \(5\) and train.epochs \(2\) are given.*epochs=null"),
        ({"max_steps": 5, "warmup_steps": 1, "warmup_ratio": 0}, r"both train.warmup_steps \(1\) .*warmup_steps=0"),
        ({"epochs": 0}, r"train.epochs is 0; it must be a number above 0"),
        ({"max_steps": 5, "warmup_ratio": 1.5}, r"train.warmup_ratio is 1.5; it must be a number from 0 to 1"),
    ],
)
def test_lengths_that_cannot_be(train, told):
    with pytest.raises(ConfigError, match=told):
        parsed(**train)


def test_a_run_in_epochs_is_one_in_steps_and_can_be_made_longer(tiny_run):
    Path("train.txt").write_text("one two one two three " * 40)
    code, out, err = tiny_run(*EPOCHS, "train.epochs=1", "run.name=epochs")
    assert code == 0, err
    samples = int(out.split(" samples of 16 ")[0].rpartition(" ")[2])
    steps, last = -(-samples // 4), -(-2 * samples // 4)
    assert f"steps:     1 epoch is {steps} steps of 4 samples" in out
    assert f"steps:     the warm-up takes 1 step of {steps}" in out
    saved = yaml.safe_load(Path("runs/epochs/config.yaml").read_text())["train"]
    assert (saved["max_steps"], saved["epochs"], saved["warmup_ratio"], saved["warmup_steps"]) == (None, 1, 0.001, 0)
    run = read_run(Path("runs/epochs"))
    assert (run.max_steps, run.finished) == (steps, True)
    train = [row for row in rows("runs/epochs/metrics.jsonl") if "lr" in row]
    assert [row["step"] for row in train] == list(range(1, steps + 1))
    assert [row["lr"] for row in (train[0], train[-1])] == pytest.approx([0.005, 0.001])  # of a warm-up and of a cosine

    code, out, err = tiny_run(*EPOCHS, "train.epochs=2", "run.name=epochs", "--resume", "auto")
    assert code == 0, err
    assert read_run(Path("runs/epochs")).max_steps == last
    state = json.loads(Path(f"runs/epochs/checkpoints/step-{last:08d}/state.json").read_text())
    assert (state["config"]["train"]["epochs"], state["config"]["train"]["max_steps"]) == (2, None)
    for length, more in ((steps, ()), (last, ("--resume", "auto"))):
        given = (*SHORT, "train.warmup_steps=1", f"train.max_steps={length}", "run.name=steps", *more)
        assert tiny_run(*given)[0] == 0
    assert_same(final_state("runs/epochs", last), final_state("runs/steps", last))


def test_a_hub_dataset_needs_a_limit(tiny_run):
    hub = ("data.train=someone/somewhere", "data.tokenizer=x", "train.max_steps=null", "train.epochs=1")
    code, _, err = tiny_run(*hub)
    assert code == 2
    assert "train.epochs is 1, and data.train 'someone/somewhere' is a hub dataset" in err
    assert "data.max_tokens, or give train.max_steps" in err


def test_a_plan_needs_no_data(tiny_run):
    code, out, err = tiny_run("--plan", "data.train=absent.txt", "train.max_steps=null", "train.epochs=3",
                              "model.overrides.vocab_size=512")  # fmt: skip
    assert code == 0, err
    assert "total" in out
