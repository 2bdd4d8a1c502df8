"""``--preview N``: the first rows of a run, and what the loss learns of them."""

import json
import re

import pytest

from qgalore import config
from qgalore.training import assemble, preview


def shown(out: str, margin: str) -> list[str]:
    """The lines that stand behind ``margin``."""
    return [line.partition(" | ")[2] for line in out.splitlines() if line.startswith(f"{margin:>8} | ")]


def test_rows_are_those_of_the_first_step(tiny_run, tmp_path):
    code, out, _ = tiny_run("--preview", "4", "run.seed=3")
    assert code == 0
    assert not (tmp_path / "runs").exists()
    made = assemble.build(config.load("tiny.yaml", ["run.seed=3"]), None)
    numbers, _ = made.loop.data.order_for(0).take(made.loop.position.sample, 4)
    batch = made.loop.data.train.batch(numbers)
    for number, labels in zip(numbers, batch["labels"], strict=True):
        assert (
            f"(sample {number:,} of {len(made.loop.data.train):,}): 32 tokens, {(labels != -100).sum()} targets" in out
        )
    assert "in 1 part that sees only itself" in tiny_run("--preview", "9", "data.document_attention=joined")[1]
    for row in batch["input_ids"].tolist():
        for line in made.tokenizer.decode(row[1:]).split("\n"):
            assert line.strip() in out


def test_every_token_is_learned_but_the_first_of_a_row_or_document(tiny_run, tmp_path):
    (tmp_path / "three.jsonl").write_text("".join(json.dumps({"text": word}) + "\n" for word in ("one", "two") * 40))
    _, out, _ = tiny_run("--preview", "1", "data.train=three.jsonl", "data.valid_fraction=0.3", "data.vocab_size=262",
                         "data.valid=null", "data.sequence_length=8", "data.text_key=text")  # fmt: skip
    # Each document is a token and its end, and the token is no target of the document before.
    assert set(shown(out, "masked")) == {"one", "two"}
    assert set(shown(out, "learned")) == {"<|endoftext|>"}


def test_answers_are_learned_and_padding_is_counted(tiny_run, tmp_path):
    rows = [{"prompt": f"Add {n} and 1.", "completion": f"{n + 1}."} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, _ = tiny_run("--preview", "3", "data.task=instruct", "data.train=rows.jsonl", "data.valid=null",
                            "data.valid_fraction=0.2", "data.vocab_size=300", "data.sequence_length=64")  # fmt: skip
    assert code == 0
    questions = [line.removeprefix("Add ").partition(" ")[0] for line in shown(out, "masked") if "Add " in line]
    answers = [line.partition(".")[0] for line in shown(out, "learned")]
    assert questions
    assert answers == [str(int(question) + 1) for question in questions]
    assert "<|endoftext|> × " in out
    assert "<|endoftext|><|endoftext|><|endoftext|><|endoftext|>" not in out


def test_fewer_rows_than_asked_for_are_all_shown_once(tiny_run, tmp_path):
    (tmp_path / "short.txt").write_text("a few words of text, " * 20)
    _, out, _ = tiny_run("--preview", "999", "data.train=short.txt", "data.valid=null", "data.valid_fraction=0.4",
                         "data.vocab_size=300", "data.sequence_length=16")  # fmt: skip
    numbers = [line.split("(sample ")[1].split()[0] for line in out.splitlines() if line.startswith("row ")]
    assert len(numbers) == len(set(numbers)) == int(out.split("(sample ")[1].split(" of ")[1].partition(")")[0])


def test_lines_have_colours_on_a_terminal_alone(tiny_run, monkeypatch):
    """The same text in both, and no colour for one who wants none."""
    _, plain, _ = tiny_run("--preview", "1")
    monkeypatch.setattr(preview.sys.stdout, "isatty", lambda: True)
    _, out, _ = tiny_run("--preview", "1")
    assert "\x1b" not in plain
    assert "\x1b[32m learned | " in out
    assert "\x1b[2m  masked | " in out
    assert re.sub(r"\x1b\[\d+m", "", out).partition("row 1")[2] == plain.partition("row 1")[2]
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in tiny_run("--preview", "1")[1]


@pytest.mark.parametrize("other", [("--plan",), ("--resume", "auto")])
def test_other_ways_to_run_are_refused_beside_it(tiny_run, capfd, other):
    with pytest.raises(SystemExit):
        tiny_run("--preview", "1", *other)
    assert "leave out --plan and --resume" in capfd.readouterr().err
