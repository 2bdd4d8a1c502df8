"""Held-out sets with names, and the held-out loss before the first step."""

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import rows

from qgalore import config
from qgalore.convergence import charts, table, tensorboard
from qgalore.convergence.records import read_run
from qgalore.convergence.summary import summarise
from qgalore.errors import ConfigError
from qgalore.evaluation.loss import Evaluation, evaluate, evaluate_sets
from qgalore.models.loss import summed_loss, target_tokens

SHORT = ("data.train=train.txt", "data.vocab_size=300", "data.sequence_length=16", "data.valid_fraction=0.2",
         "export.formats=[]", "sample.max_new_tokens=0", "train.eval_every=1", "train.save_every=1")  # fmt: skip
SETS = "data.valid={stories: stories.txt, code: code.txt}"


@pytest.fixture(autouse=True)
def texts(tiny_run):
    Path("train.txt").write_text("one two one two three " * 60)
    Path("stories.txt").write_text("A hen met a fox, and the fox met a dog. " * 6)
    Path("code.txt").write_text("if x: y = [1, 2]; z = {3} " * 20)


def evaluations(run):
    return {row["step"]: row for row in rows(f"runs/{run}/metrics.jsonl") if "eval_loss" in row}


def test_every_token_of_all_sets_weighs_the_same(tiny_llama):
    model, generator = tiny_llama(), torch.Generator().manual_seed(3)

    def batch(count, length):
        ids = torch.randint(0, 96, (count, length), generator=generator)
        return {"input_ids": ids, "labels": ids.roll(-1, 1), "position_ids": torch.arange(length).expand(count, -1)}

    sets = {"few": [partial(batch(1, 5).copy)], "many": [partial(batch(3, 20).copy), partial(batch(2, 20).copy)]}
    how = {"summed_loss": summed_loss, "target_tokens": target_tokens, "device": torch.device("cpu")}
    made = evaluate_sets(model, sets, **how)
    joined = evaluate(model, [*sets["few"], *sets["many"]], **how)
    assert made.tokens == joined.tokens == 105
    assert made.loss == pytest.approx(joined.loss, rel=1e-6)
    alone = {name: evaluate(model, batches, **how).loss for name, batches in sets.items()}
    assert made.row() == {
        "eval_loss": made.loss, "eval_perplexity": made.perplexity,
        "eval_loss/few": alone["few"], "eval_loss/many": alone["many"],
    }  # fmt: skip
    assert abs(made.loss - sum(alone.values()) / 2) > 1e-3, "the test wants sets whose plain mean is another"


def test_what_is_trained_on_and_held_out_is_named(tiny_run):
    """By its tokens, so a copy under another name is found too."""
    Path("copy.txt").write_bytes(Path("train.txt").read_bytes())
    code, out, err = tiny_run(*SHORT, "data.valid={stories: stories.txt, same: copy.txt}", "train.max_steps=1")
    assert code == 0, err
    assert [line for line in out.splitlines() if "is held out and trained on" in line] == [
        "note:      copy.txt is held out and trained on, so its loss says nothing of new text; name another file, or "
        "leave data.valid out"
    ]


def test_each_set_is_told_by_name_from_before_the_first_step(tiny_run):
    code, out, err = tiny_run(*SHORT, SETS, "train.max_steps=1", "run.name=both")
    assert code == 0, err
    both = evaluations("both")
    assert list(both) == [0, 1]
    for name in ("stories", "code"):
        assert tiny_run(*SHORT, f"data.valid={name}.txt", "train.max_steps=1", f"run.name={name}")[0] == 0
        alone = evaluations(name)
        assert [row["eval_loss"] for row in alone.values()] == [row[f"eval_loss/{name}"] for row in both.values()]
        assert not any(key.startswith("eval_loss/") for row in alone.values() for key in row)
        assert f"{name} {both[0][f'eval_loss/{name}']:.4f}" in out
    assert out.index("step 0/1 | held-out loss") < out.index("step 1/1 | loss")
    assert (both[1]["eval_loss"] > both[0]["eval_loss"]) == ("worse" in out.splitlines()[-1])
    low, high = sorted(both[1][f"eval_loss/{name}"] for name in ("stories", "code"))
    assert low < both[1]["eval_loss"] < high

    run = read_run(Path("runs/both"))
    assert f"(stories {both[1]['eval_loss/stories']:.4f}, code {both[1]['eval_loss/code']:.4f})" in " ".join(
        table.state(summarise(run)).split()
    )
    scalars = list(tensorboard.scalars(run))
    assert ("held_out/eval_loss/code", both[0]["eval_loss/code"], 0) in scalars
    assert all(f"held out, {name}" in charts.loss(run) for name in ("stories", "code"))

    # A resumed run has been evaluated before.
    before = Path("runs/both/metrics.jsonl").read_text()
    code, out, err = tiny_run(*SHORT, SETS, "train.max_steps=2", "run.name=both", "--resume", "auto")
    assert code == 0, err
    assert "step 0/" not in out
    assert Path("runs/both/metrics.jsonl").read_text().startswith(before)


def test_the_loss_before_the_first_step_is_never_the_best(tiny_run):
    """Whatever comes after it is worse, and still step 1 is the best: of step 0 there is no checkpoint."""
    worse = ("train.lr=0.3", "train.lr_schedule=constant", "train.warmup_steps=0", "train.max_steps=9")
    code, out, err = tiny_run(*SHORT, *worse, "data.valid=code.txt", "train.keep_best=true", "train.early_stopping=2")
    assert code == 0, err
    losses = {step: row["eval_loss"] for step, row in evaluations("tiny").items()}
    assert losses[0] == min(losses.values()), "the test wants a run that gets worse at once"
    last_line = out.splitlines()[-1]
    assert (
        f"; all held-out losses since are above the {losses[0]:.4f} before step 1, so the run made the model"
        in last_line
    )
    last = max(losses)
    best = min(range(1, last + 1), key=losses.get)
    state = json.loads(Path(f"runs/tiny/checkpoints/step-{last:08d}/state.json").read_text())
    assert (state["position"]["best_step"], state["position"]["best_loss"]) == (best, losses[best])
    assert last == best + 2


@pytest.mark.parametrize(
    ("valid", "told"),
    [
        ("{}", r"data\.valid is a mapping of 0 keys; it must be a file, .* mapping of names"),
        ("{a/b: code.txt}", r"data\.valid is \{a/b: code\.txt\}; .* names of at most 100 letters"),
        ("{a: [code.txt]}", r"data\.valid is a mapping of one key"),
        ("{code: coed.txt}", r"data\.valid\.code: data source 'coed\.txt' does not exist.*code\.txt"),
        ("{code: short.txt}", r"data\.valid\.code: the data has \d+ tokens"),
    ],
)  # fmt: skip
def test_sets_that_cannot_be_read(tiny_run, valid, told):
    Path("short.txt").write_text("a")
    code, _, err = tiny_run(*SHORT, f"data.valid={valid}")
    assert code == 2
    assert re.search(told, err), err


def test_a_set_is_read_as_it_says_itself(tiny_run):
    """The loss of rows under another key is that of the same text under the usual one, alone and beside others."""
    texts = Path("stories.txt").read_text()
    Path("rows.jsonl").write_text(json.dumps({"body": texts}) + "\n")
    Path("usual.jsonl").write_text(json.dumps({"text": texts}) + "\n")
    valid = "{own: {path: rows.jsonl, text_key: body}, usual: usual.jsonl}"
    code, _, err = tiny_run(*SHORT, f"data.valid={valid}", "train.max_steps=1", "run.name=both")
    assert code == 0, err
    code, _, err = tiny_run(*SHORT, "data.valid={path: rows.jsonl, text_key: body}", "train.max_steps=1")
    assert code == 0, err
    for step, row in evaluations("both").items():
        assert row["eval_loss/own"] == row["eval_loss/usual"] == evaluations("tiny")[step]["eval_loss"]
    code, _, err = tiny_run(*SHORT, "data.valid={own: rows.jsonl}", "run.name=not")
    assert (code, "data.valid.own: 'rows.jsonl' line 1 has no 'text'" in err) == (2, True)


def test_conversations_are_held_out_beside_text(tiny_run):
    """Text alone counts every token, and of conversations the answers do."""
    talk = [{"prompt": f"Add {n} and 1.", "completion": f"{n + 1}."} for n in range(30)]
    Path("talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talk))
    sets = "data.valid={text: {path: stories.txt, task: text}, talk: talk.jsonl}"
    code, _, err = tiny_run(*SHORT, "data.train=talk.jsonl", sets, "data.task=instruct", "data.sequence_length=32",
                            "train.max_steps=1")  # fmt: skip
    assert code == 0, err
    assert {"eval_loss/text", "eval_loss/talk"} < evaluations("tiny")[1].keys()


@pytest.mark.parametrize(
    ("valid", "told"),
    [
        ({"a": {"path": "a", "task": "x"}}, r"data\.valid\.a\.task is 'x'; it must be text or instruct"),
        ({"path": "a", "task": "x"}, r"data\.valid\.task is 'x'"),
        ({"a": {"path": "a", "weight": 2}}, r"data\.valid\.a\.weight: unknown key; known here: path, text_key, task"),
        ({"a": {"path": "a", "field": "x"}}, r"data\.valid\.a\.field: unknown key; .* data\.valid\.a\.text_key"),
        ({"a": {"text_key": "x"}}, r"data\.valid\.a\.path: missing"),
        ({"a": {"path": "a", "task": "instruct"}}, r"data\.valid\.a: a source has task: instruct"),
        ({"": "a", "b": "b"}, r"data\.valid: one of several held-out sets has no name"),
        ({"task": {"path": ""}}, r"data\.valid\.task\.path is ''"),
    ],
)  # fmt: skip
def test_sets_that_cannot_be(valid, told):
    data = {"train": {"path": "a", "weight": 1}, "valid": valid}
    with pytest.raises(ConfigError, match=told):
        config.parse({"model": {"config": "llama_60m"}, "data": data, "train": {"lr": 0.1, "max_steps": 1}}, "here")


def test_a_classifier_has_one_set(tiny_run):
    code, _, err = tiny_run(*SHORT, SETS, "data.task=classify", "data.tokenizer=x")
    assert code == 2
    assert "data.valid: data.task: classify has one held-out set" in err


def test_numbers_are_names_too(tiny_run):
    Path("2024").write_text("x")
    held_out = config.load("tiny.yaml", ["data.valid={2023: 2024, b: {path: 007}}"]).data.held_out
    assert {name: source.path for name, source in held_out.items()} == {"2023": "2024", "b": "007"}


def test_a_perplexity_stays_short():
    assert str(Evaluation(2.0, 3)) == "held-out loss 2.0000 | perplexity 7.39 (3 tokens)"
    assert str(Evaluation(100.0, 1)) == "held-out loss 100.0000 | perplexity 2.69e+43 (1 token)"
    assert "perplexity inf" in str(Evaluation(1000.0, 1))
