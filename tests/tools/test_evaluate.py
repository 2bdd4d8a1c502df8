import importlib.util
import json
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "evaluate.py"
TURNS = [{"role": "user", "content": "Where is Mars?"}, {"role": "assistant", "content": "In the sky."}]


@pytest.fixture
def evaluate():
    spec = importlib.util.spec_from_file_location("evaluate_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def files(tmp_path):
    rows = [
        {"question": f"What is number {n}?", "choices": ["a planet", "a ship", "x"], "answer": n % 3} for n in range(9)
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "t.txt").write_text("No one would have believed, in the last years of the century. " * 30)
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": TURNS}) + "\n")
    return ["--choices", "q.jsonl", "--text", "t.txt", "--instruct", "c.jsonl", "--sequence", "64"]


def test_a_run_its_checkpoint_and_its_export_agree(tiny_run, evaluate, files, capfd):
    code, _, err = tiny_run("train.max_steps=2")
    assert code == 0, err
    found = {}
    for name in ("runs/tiny", "runs/tiny/checkpoints/step-00000002", "runs/tiny/export/hf"):
        assert evaluate([name, *files, "--shots", "2", "--limit", "5", "--json", "out.json"]) == 0, (
            capfd.readouterr().err
        )
        found[name] = json.loads(Path("out.json").read_text())["results"]
    run, saved, export = found.values()
    assert run == saved
    asked, text, answers = run
    assert (asked["questions"], asked["shots"], asked["chance"]) == (5, 2, pytest.approx(1 / 3))
    assert asked["accuracy"] in [n / 5 for n in range(6)]
    assert 4 < text["loss"] < 7  # 512 entries: 6.2 before the first step
    assert 0 < answers["tokens"] < 12
    # The export is rounded to bf16 once, 2⁻⁹ of each weight.
    assert [one["loss"] for one in export[1:]] == pytest.approx([text["loss"], answers["loss"]], rel=0.01)
    out = capfd.readouterr().out
    assert "chance 0.333 | 5 questions, 2 shots" in out
    assert "tokens of answers of conversations" in out


def test_bad_arguments_are_named(evaluate, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "tagger").mkdir()
    (tmp_path / "tagger" / "config.json").write_text('{"architectures": ["LlamaForSequenceClassification"]}')
    (tmp_path / "young" / "checkpoints").mkdir(parents=True)
    for arguments, message in [
        (["x", "--text", "t.txt"], "x does not exist"),
        (["empty", "--text", "t.txt"], "no run, checkpoint or hf folder"),
        (["tagger", "--text", "t.txt"], "tagger holds a classifier, which continues no text"),
        (["young", "--text", "t.txt"], "young/checkpoints holds no usable checkpoint"),
        (["x"], "nothing to evaluate"),
        (["x", "--text", "t.txt", "--json", "no/where.json"], "--json no/where.json cannot be written"),
        (["x", "--text", "t.txt", "--device", "tpu7"], "--device tpu7: "),
        (["x", "--text", "t.txt", "--device", "cuda:64"], "--device cuda:64: "),
    ]:
        assert evaluate(arguments) == 2
        assert message in capfd.readouterr().err
    for option in ("--limit", "--batch", "--sequence", "--shots"):
        with pytest.raises(SystemExit) as stopped:
            evaluate(["x", "--text", "t.txt", option, "-1"])
        assert stopped.value.code == 2
        assert "is not a whole number from" in capfd.readouterr().err
