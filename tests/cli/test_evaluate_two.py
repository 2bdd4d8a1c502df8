"""``qgalore evaluate`` with tasks of lm-eval, and with two models: the right figures, and what changed between them."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from qgalore.cli.evaluate import main
from qgalore.data.tokenizer import train_tokenizer
from qgalore.evaluation.figures import Figure, difference, table
from qgalore.files import export_hf

WORDS = ["a planet", "a ship", "the sea at night", "x"]


def export(folder: Path, seed: int, texts: str = "number of a planet") -> None:
    tokenizer = train_tokenizer([texts] * 5, vocab_size=300, report=lambda line: None)
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=320, max_position_embeddings=128, initializer_range=0.3, **shape)
    export_hf.save(LlamaForCausalLM(config), tokenizer, folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two models, questions, a text, and the questions as a task of lm-eval."""
    place = tmp_path_factory.mktemp("evaluated")
    export(place / "one", seed=1)
    export(place / "two", seed=2)
    rows = [{"question": f"What is number {n}?", "choices": WORDS, "answer": n % 4} for n in range(24)]
    (place / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "t.txt").write_text("No one would have believed. " * 30)
    task = {
        "task": "planets",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(place / "q.jsonl")}, "cache_dir": str(place / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
        ],
        "metadata": {"version": 3},
    }
    (place / "tasks").mkdir()
    (place / "tasks" / "planets.yaml").write_text(yaml.safe_dump(task))
    return place


@pytest.fixture
def evaluate(place, monkeypatch, capfd):
    """A function (arguments…) → (exit code, output, errors, what evaluation.json holds)."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*arguments):
        Path("evaluation.json").unlink(missing_ok=True)
        capfd.readouterr()
        code = main(list(arguments))
        output = capfd.readouterr()
        written = json.loads(Path("evaluation.json").read_text()) if Path("evaluation.json").exists() else None
        return code, output.out, output.err, written

    return run


def test_a_task_of_lm_eval_counts_what_choices_count(evaluate):
    """The same questions in the same words: acc is the accuracy, and acc_norm, by letters, that by byte."""
    pytest.importorskip("lm_eval", reason="hands tasks to lm-eval")
    code, out, err, written = evaluate(
        "one", "--choices", "q.jsonl", "--tasks", "planets", "--include-path", "tasks", "--limit", "20"
    )
    assert code == 0, err
    asked, raw, by_letter = written["results"]
    assert (raw["kind"], raw["task"], raw["metric"], by_letter["metric"]) == ("task", "planets", "acc", "acc_norm")
    assert raw["value"] == asked["accuracy"]
    assert by_letter["value"] == asked["accuracy_per_byte"]
    assert 0 < raw["value"] < 1  # else any two would agree
    assert (raw["samples"], raw["shots"], raw["version"], raw["higher_is_better"]) == (20, 0, 3, True)
    # lm-eval divides by n − 1, we by n
    assert raw["error"] == pytest.approx(asked["accuracy_error"] * (20 / 19) ** 0.5)
    assert f"planets acc                      {raw['value']:.3f} ± {raw['error']:.3f} | 20 samples, 0 shots" in out


def test_two_models_are_shown_side_by_side(evaluate):
    asked_for = ("--choices", "q.jsonl", "--text", "t.txt", "--sequence", "64")
    alone = [evaluate(name, *asked_for)[3]["results"] for name in ("one", "two")]
    code, out, err, written = evaluate("one", "two", *asked_for)
    assert code == 0, err
    assert [one["results"] for one in written["models"]] == alone
    accuracy, _, loss = written["comparison"]
    (asked, text), (asked_after, text_after) = alone
    assert accuracy["difference"] == pytest.approx(asked_after["accuracy"] - asked["accuracy"])
    assert loss["difference"] == pytest.approx(text_after["loss"] - text["loss"])
    assert loss["error"] is None
    header, *rows = [line for line in out.splitlines() if "written" not in line][2:]
    assert header.split() == ["before", "after", "difference"]
    assert rows[0].startswith(f"q.jsonl accuracy  {asked['accuracy']:.3f} ± ")
    assert f"{text['loss']:.4f}" in rows[2]
    assert rows[2].endswith(f"{loss['difference']:+.4f}")
    assert out.startswith("before: one\nafter:  two\n")


def test_losses_over_other_tokens_are_not_subtracted(evaluate, place):
    """The tokenizers agree in how many rows of 64 tokens the text has, and not in which."""
    export(place / "other", seed=1, texts="No one")
    code, out, err, written = evaluate("one", "other", "--text", "t.txt", "--sequence", "64", "--limit", "2")
    assert code == 0, err
    assert [one["results"][0]["tokens"] for one in written["models"]] == [128, 128]
    assert written["comparison"][0]["difference"] is None
    assert "and not the same ones, so the two cannot be compared" in out


def test_what_is_wrong_is_said_before_a_model_is_loaded(evaluate, place, monkeypatch):
    known = importlib.util.find_spec
    (place / "empty").mkdir(exist_ok=True)
    for arguments, told in (
        (["one", "nowhere", "--text", "t.txt"], "nowhere does not exist"),
        (["one", "--text", "t.txt", "--include-path", "tasks"], "none is asked for; give --tasks"),
    ):
        code, _, err, _ = evaluate(*arguments)
        assert (code, told in err) == (2, True), err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else known(name))
    code, _, err, _ = evaluate("empty", "--tasks", "arc_easy")
    assert code == 2
    assert "Run: pip install 'lm-eval>=" in err


@pytest.mark.parametrize("broken", ["config.json", "tokenizer.json", "model.safetensors", "all"])
def test_the_second_model_is_looked_at_before_the_first_is_loaded(evaluate, place, monkeypatch, broken):
    shutil.rmtree(place / "broken", ignore_errors=True)
    shutil.copytree(place / "two", place / "broken")
    for file in list((place / "broken").iterdir()):
        if broken == "all":
            file.unlink()
        elif file.name == broken:
            file.write_text("{")
    monkeypatch.setattr("qgalore.cli.evaluate.load", lambda source: pytest.fail(f"{source} is loaded"))
    code, _, err, _ = evaluate("one", "broken", "--text", "t.txt")
    assert (code, err.startswith("error: ")) == (2, True), err
    assert ("broken is no run" if broken == "all" else "broken") in err


def test_a_task_that_lm_eval_cannot_run_is_named(evaluate, place):
    pytest.importorskip("lm_eval", reason="hands tasks to lm-eval")
    broken = (place / "tasks" / "planets.yaml").read_text().replace("q.jsonl", "gone.jsonl")
    (place / "broken").mkdir(exist_ok=True)
    (place / "broken" / "planets.yaml").write_text(broken)
    code, _, err, written = evaluate("one", "--tasks", "planets", "--include-path", "broken")
    assert (code, written) == (2, None)
    assert "--tasks planets: lm-eval stopped with FileNotFoundError" in err


@pytest.mark.slow
def test_an_unknown_task_is_answered_with_near_ones(evaluate):
    """lm-eval then reads all of its own task files."""
    pytest.importorskip("lm_eval", reason="asks lm-eval for its tasks")
    code, _, err, _ = evaluate("one", "--tasks", "arc_eazy")
    assert code == 2
    assert "knows no task arc_eazy. Did you mean arc_easy" in err


def test_the_error_of_a_difference_is_that_of_pairs():
    """Differences 1, 0, 0, 1 have a mean of 0.5 and a variance of 1/3, so the mean's error is √(1/12)."""
    one = Figure("f", 0.25, 4, 0.22, (0, 0, 1, 0))
    made = difference(one, Figure("f", 0.75, 4, 0.22, (1, 0, 1, 1)))
    assert (made.value, made.error) == (0.5, pytest.approx(12**-0.5))
    assert str(made) == "+0.500 ± 0.289"
    assert difference(one, Figure("f", 0.25, 4, 0.22, one.values)).error == 0
    apart = difference(Figure("f", 1.0, 4, 0.3), Figure("f", 0.0, 4, 0.4))
    assert (apart.value, apart.error) == (-1.0, pytest.approx(0.5))
    assert difference(Figure("f", 1.0, 4), Figure("f", 0.0, 4, 0.4)).error is None


def test_a_table_without_errors_explains_none():
    lines = table([difference(Figure("loss", 2.0, 9, digits=4), Figure("loss", 1.5, 9, digits=4))])
    assert lines == ["      before  after   difference", "loss  2.0000  1.5000  -0.5000"]
