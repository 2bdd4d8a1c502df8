"""Whole runs on conversations: the same bits after a resume, a changed mask refused, the answers learnt."""

import json
import shutil
from datetime import date
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from qgalore.data.chat import PLAIN_TEMPLATE
from qgalore.data.tokenizer import train_tokenizer
from qgalore.training import assemble

ROWS = [
    {"messages": [{"role": "user", "content": f"Say {w} twice."}, {"role": "assistant", "content": f"{w} {w}"}]}
    for w in ("red", "green", "blue", "black", "white", "brown", "pink", "grey", "gold", "plum", "teal", "rust", "sand")
] * 5
INSTRUCT = ("data.task=instruct", "data.train=rows.jsonl", "data.vocab_size=300", "data.sequence_length=64")


def write_rows(rows):
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def final(run, step):
    return load_file(f"runs/{run}/checkpoints/step-{step:08d}/model.safetensors")


def test_a_run_on_conversations_learns_answers_and_resumes_to_the_same_bits(tiny_run):
    write_rows(ROWS)
    code, out, err = tiny_run(*INSTRUCT, "train.max_steps=6")
    assert code == 0, err
    assert "it gets a plain one" in out
    assert "of them in answers" in out
    rows = [json.loads(line) for line in Path("runs/tiny/metrics.jsonl").read_text().splitlines()]
    held_out = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert held_out[-1] < held_out[0]
    tokenizer = AutoTokenizer.from_pretrained("runs/tiny/export/hf")
    asked = tokenizer.apply_chat_template(ROWS[0]["messages"][:1], tokenize=False, add_generation_prompt=True)
    assert asked == "### User:\nSay red twice.\n\n### Assistant:\n"

    assert tiny_run(*INSTRUCT, "run.name=cut", "train.max_steps=6", "train.keep_last=5")[0] == 0
    code, out, err = tiny_run(*INSTRUCT, "run.name=cut", "--resume", "runs/cut/checkpoints/step-00000002")
    assert code == 0, err
    assert "after step 2" in out
    whole, resumed = final("tiny", 6), final("cut", 6)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_a_resume_with_other_answers_is_refused(tiny_run):
    write_rows(ROWS)
    assert tiny_run(*INSTRUCT, "train.max_steps=2")[0] == 0
    question, answer = ROWS[0]["messages"]
    write_rows([{"messages": [question, {**answer, "content": "red and red"}]}, *ROWS[1:]])
    code, _, err = tiny_run(*INSTRUCT, "--resume", "auto")
    assert code == 2
    assert "made with other tokens" in err


def test_a_bad_row_is_named(tiny_run):
    write_rows([*ROWS[:2], {"text": "no conversation"}])
    code, _, err = tiny_run(*INSTRUCT)
    assert code == 2
    assert "'rows.jsonl' line 3 has the keys 'text'" in err


def test_a_sample_is_asked_as_a_user_asks(tiny_run):
    write_rows(ROWS)
    code, out, err = tiny_run(*INSTRUCT, "train.max_steps=1", "sample.prompt=Say gold twice.", "export.formats=[]")
    assert code == 0, err
    assert "### User:\nSay gold twice.\n\n### Assistant:\n" in out


def test_a_template_with_a_date_keeps_that_of_the_first_day(tiny_run, monkeypatch):
    class Later(date):
        @classmethod
        def today(cls):
            return cls(2031, 2, 3)

    write_rows(ROWS)
    tokenizer = train_tokenizer([str(row) for row in ROWS], vocab_size=300, report=lambda line: None)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + PLAIN_TEMPLATE
    tokenizer.save_pretrained("dated")
    arguments = (*INSTRUCT[:2], *INSTRUCT[3:], "data.tokenizer=dated", "train.max_steps=4", "export.formats=[]")
    code, out, err = tiny_run(*arguments)
    assert code == 0, err
    assert f"in this run it is {date.today().isoformat()}, also when resumed" in out
    monkeypatch.setattr(assemble, "date", Later)
    shutil.rmtree("cache")
    code, out, err = tiny_run(*arguments, "--resume", "runs/tiny/checkpoints/step-00000002")
    assert code == 0, err
    assert f"in this run it is {date.today().isoformat()}" in out
    code, out, err = tiny_run(*arguments, "run.name=later")
    assert code == 0, err
    assert "in this run it is 2031-02-03" in out


def test_an_array_of_alpaca_rows_trains_as_its_lines_do(tiny_run):
    rows = [{"instruction": f"Add {n} and 1.", "input": "", "output": f"{n + 1}."} for n in range(40)]
    write_rows(rows)
    Path("rows.json").write_text(json.dumps(rows, indent=1))
    counts = []
    for name in ("rows.jsonl", "rows.json"):
        code, out, err = tiny_run(*INSTRUCT, f"data.train={name}", f"run.name={name}", "train.max_steps=1")
        assert code == 0, err
        counts.append(out.split("tokens: ")[1].split(" documents")[0].split(": ")[1])
    assert counts[0] == counts[1]
