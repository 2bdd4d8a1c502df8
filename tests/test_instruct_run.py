"""Whole runs on conversations: the same bits after a resume, a changed mask refused, the answers learnt."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

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
