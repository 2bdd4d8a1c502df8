"""Runs on several sources: equal to a run on one where there is one, and to the unbroken run where it was resumed."""

import json
from pathlib import Path

import pytest
from helpers import assert_same, final_state, rows
from safetensors.torch import load_file

from qgalore.files import checkpoint

SHORT = ("data.vocab_size=320", "data.sequence_length=16", "data.valid_fraction=0.2", "sample.max_new_tokens=0",
         "train.lr_schedule=constant", "train.warmup_steps=0", "train.eval_every=3", "train.save_every=3",
         "train.lr=0.003")  # fmt: skip
TWO = "data.train=[{path: tales.txt, weight: 3}, {path: notes.jsonl, text_key: body}]"
TIMES = {"tokens_per_second", "step_seconds", "refresh_seconds", "memory_bytes"}


@pytest.fixture(autouse=True)
def texts(tiny_run):
    Path("tales.txt").write_text("A hen met a fox, and the fox met a dog. " * 40)
    notes = [{"body": f"Note {n}: the sum of {n} and {n} is {2 * n}."} for n in range(12)]
    Path("notes.jsonl").write_text("".join(json.dumps(one) + "\n" for one in notes))


def records(run):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows(f"runs/{run}/metrics.jsonl")]


def test_a_mixture_of_one_source_is_that_source(tiny_run):
    """In every bit of the records and of the export, whatever its weight is. A checkpoint from before there were
    mixtures, whose position was of one source, goes on as well."""
    for name, train in (("alone", "tales.txt"), ("mixed", "[{path: tales.txt, weight: 7}]")):
        run = (*SHORT, f"data.train={train}", f"run.name={name}")
        code, out, err = tiny_run(*run, "train.max_steps=3", "export.formats=[]")
        assert code == 0, err
        assert "source:" not in out
        path = Path(f"runs/{name}/checkpoints/step-00000003/state.json")
        state = json.loads(path.read_text())
        (state["position"]["sample"],) = state["position"]["sample"]
        path.write_text(json.dumps({**state, "sha256": checkpoint.seal_of(state)}))
        code, _, err = tiny_run(*run, "train.max_steps=4", "--resume", "auto")
        assert code == 0, err
    state = json.loads(Path("runs/alone/checkpoints/step-00000004/state.json").read_text())
    assert state["config"]["data"]["train"] == "tales.txt", "it is written down as it was asked for"
    assert records("alone") == records("mixed")
    alone, mixed = (load_file(f"runs/{name}/export/hf/model.safetensors") for name in ("alone", "mixed"))
    assert_same(alone, mixed)


def test_a_run_that_is_resumed_in_a_mixture_is_the_unbroken_one(tiny_run):
    quiet = (*SHORT, TWO, "export.formats=[]")
    code, out, err = tiny_run(*quiet, "run.name=whole", "train.max_steps=6")
    assert code == 0, err
    assert tiny_run(*quiet, "run.name=cut", "train.max_steps=3")[0] == 0
    code, _, err = tiny_run(*quiet, "run.name=cut", "train.max_steps=6", "--resume", "auto")
    assert code == 0, err
    assert records("cut") == records("whole")
    assert_same(final_state("runs/cut"), final_state("runs/whole"))
    for file in ("model.safetensors", "optimizer.safetensors"):
        cut, whole = (Path(f"runs/{name}/checkpoints/step-00000006/{file}").read_bytes() for name in ("cut", "whole"))
        assert cut == whole, file

    # Every source has its line, its share, its own held-out set, and a count of what was drawn of it.
    assert "source:    tales: " in out
    assert "; 75.0% of what is drawn, " in out
    assert "source:    notes: " in out
    assert "; 25.0% of what is drawn, " in out
    held_out = [row for row in records("whole") if "eval_loss" in row]
    assert [(row["step"], row["drawn/tales"], row["drawn/notes"]) for row in held_out] == [
        (0, 0, 0), (3, 9, 3), (6, 18, 6)
    ]  # fmt: skip
    for row in held_out:
        low, high = sorted(row[f"eval_loss/{name}"] for name in ("tales", "notes"))
        assert low < row["eval_loss"] < high
    state = json.loads(Path("runs/whole/checkpoints/step-00000006/state.json").read_text())
    assert len(state["position"]["sample"]) == 2

    # The bytes of every source belong to the run, and so do the weights.
    Path("notes.jsonl").write_text(Path("notes.jsonl").read_text().replace("sum", "Sum"))
    code, _, err = tiny_run(*quiet, "run.name=whole", "train.max_steps=7", "--resume", "auto",
                            "data.tokenizer=runs/whole/tokenizer")  # fmt: skip
    assert (code, "data.tokenizer" in err) == (2, True)
    code, _, err = tiny_run(*quiet, TWO.replace("3", "2"), "run.name=whole", "train.max_steps=7", "--resume", "auto")
    assert (code, "  data.train[0].weight: 3.0 → 2.0\n" in err) == (2, True)
    assert "A new run may begin on its state with all of these: train.restart_schedule=true, another run.name" in err
    code, _, err = tiny_run(*quiet, TWO, "lowrank.rank=3", "run.name=whole", "train.max_steps=7", "--resume", "auto")
    assert (code, "lowrank.rank: " in err, "restart_schedule" in err) == (2, True, False)
    code, _, err = tiny_run(*quiet, "run.name=whole", "train.max_steps=7", "--resume", "auto")
    assert (code, "was made with other tokens" in err) == (2, True)


def test_an_epoch_of_a_mixture_is_as_many_samples_as_all_have(tiny_run):
    train = "data.train=[{path: notes.jsonl, text_key: body, weight: 9}, tales.txt]"
    code, out, err = tiny_run(*SHORT, train, "train.max_steps=null", "train.epochs=1.5", "export.formats=[]",
                              "data.valid={a: tales.txt}", "train.eval_batches=1")  # fmt: skip
    assert code == 0, err
    sizes = {line.split(":")[1].strip(): int(line.split(" samples;")[0].rpartition(" ")[2])
             for line in out.splitlines() if line.startswith("source:")}  # fmt: skip
    steps = -(-3 * sum(sizes.values()) // 2 // 4)
    assert f"1.5 epochs are {steps} steps of 4 samples" in out
    epochs = steps * 4 * 0.9 / sizes["notes"]
    assert epochs > 4, "the test wants a source that is seen often"
    assert f"; 90.0% of what is drawn, {epochs:.2f} epochs" in out
    assert f"note:      notes is seen {epochs:.1f} times, and more than 4 times teach little" in out
    last = records("tiny")[-1]
    assert last["drawn/notes"] + last["drawn/tales"] == steps * 4
    assert abs(last["drawn/notes"] - steps * 4 * 0.9) < 1
    assert {key for key in last if key.startswith("eval_loss")} == {"eval_loss", "eval_loss/a"}


def test_a_preview_says_where_each_row_comes_from(tiny_run):
    code, out, err = tiny_run(*SHORT, TWO, "--preview", "4")
    assert code == 0, err
    heads = [line for line in out.splitlines() if line.startswith("row ")]
    assert [head.split(" of ")[2].split(")")[0] for head in heads] == ["tales", "tales", "notes", "tales"]
    for part in out.split("row ")[1:]:
        assert ("hen" in part or "fox" in part or "dog" in part) == (" of tales)" in part)
        assert ("sum" in part or "Note" in part) == (" of notes)" in part)


def test_text_and_conversations_are_learned_each_in_its_way(tiny_run):
    talk = [{"prompt": f"Add {n} and 1.", "completion": f"{n + 1}."} for n in range(40)]
    Path("talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talk))
    both = ("data.train=[talk.jsonl, {path: tales.txt, task: text}]", "data.task=instruct", "data.sequence_length=32")
    code, out, err = tiny_run(*SHORT, *both, "--preview", "6")
    assert code == 0, err
    for part in out.split("row ")[1:]:
        masked = [line for line in part.splitlines() if line.startswith("  masked | ")]
        assert any("Add" in line for line in masked) == (" of talk)" in part)
    code, out, err = tiny_run(*SHORT, *both, "train.max_steps=2", "export.formats=[]")
    assert code == 0, err
    assert {"eval_loss/talk", "eval_loss/tales"} <= records("tiny")[-1].keys()
    code, _, err = tiny_run(*SHORT, "data.train=[talk.jsonl, tales.txt]", "data.task=instruct", "run.name=b")
    assert (code, "data.train[1]: " in err, "add task: text to it" in err) == (2, True, True)


@pytest.mark.parametrize(
    ("train", "told"),
    [
        ("[tales.txt, taels.txt]", "data.train[1]: data source 'taels.txt' does not exist. Close names in that folder"),
        ("[tales.txt, notes.jsonl]", "data.train[1]: 'notes.jsonl' line 1 has no 'text'"),
        ("[tales.txt, short.txt]", "data.train[1] has "),
        ('"tales.txt, notes.jsonl"', "Several sources are a list here, such as data.train=[tales.txt, notes.jsonl]"),
    ],
)  # fmt: skip
def test_a_source_that_cannot_be_read_is_named(tiny_run, train, told):
    Path("short.txt").write_text("a b c")
    code, _, err = tiny_run(*SHORT, f"data.train={train}")
    assert code == 2
    assert told in err
