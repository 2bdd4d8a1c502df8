import json

import pytest
import torch
from transformers import BertConfig, BertModel

from qgalore.data.tokenizer import train_tokenizer
from tools import glue


@pytest.fixture
def folders(tmp_path):
    """Arguments for a body of width 16 and eight rows of MRPC's layout."""
    tokenizer = train_tokenizer(["one two three four"] * 3, vocab_size=270)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(tmp_path / "body")
    tokenizer.save_pretrained(tmp_path / "body")
    (tmp_path / "data/MRPC").mkdir(parents=True)
    rows = [f"{number % 2}\t1\t2\tone two\tthree {'four' if number % 2 else 'one'}" for number in range(8)]
    for part in ("train", "dev"):
        text = "\n".join(["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", *rows])
        (tmp_path / f"data/MRPC/{part}.tsv").write_text(text)
    places = ["--model", str(tmp_path / "body"), "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out.jsonl")]
    return tmp_path / "out.jsonl", [*places, "--steps", "2", "--batch", "4", "--rank", "2"]


def test_every_method_runs_once_and_is_not_repeated(folders, capsys):
    out, arguments = folders
    assert glue.main([*arguments, "--rates", "1e-3", "--seeds", "0", "--muon-scale", "8"]) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["method"] for record in records] == list(glue.METHODS)
    assert glue.main([*arguments, "--rates", "1e-3", "--seeds", "0", "1", "--methods", "adamw", "lora"]) == 0
    again = [json.loads(line) for line in out.read_text().splitlines()]
    assert again[: len(records)] == records
    assert [(record["method"], record["seed"]) for record in again[len(records) :]] == [("adamw", 1), ("lora", 1)]
    capsys.readouterr()
    assert glue.main(["--out", str(out), "--table"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(glue.METHODS)
    assert lines[2].startswith("| MRPC | accuracy | adamw | 0.001 |")
    assert lines[2].split(" | ")[6] == "2"
    held = {record["method"]: record["bytes"] for record in records}
    assert held["qgalore"] < held["galore"] < held["adamw"]
    assert held["lora"] < held["adamw"]
    assert max(held["fira"], held["muon"]) < held["adamw"]
    assert [record["scale"] for record in records if record["method"] in ("fira", "muon")] == [4.0, 8.0]


def test_the_table_takes_the_best_rate_by_its_mean():
    def record(rate, seed, score):
        return {"task": "CoLA", "method": "lora", "rate": rate, "seed": seed, "eval_matthews": score} | {
            "seconds": 90.0,
            "bytes": 2e6,
        }

    text = glue.table([record(1e-3, 0, 0.9), record(1e-3, 1, 0.1), record(2e-3, 0, 0.6), record(2e-3, 1, None)])
    assert "| CoLA | matthews | lora | 0.001 | 0.5000 | 0.1000 – 0.9000 | 2 | 2.0 | 1.5 |" in text


def test_lora_starts_as_its_base_and_trains_nothing_else():
    torch.manual_seed(0)
    base = torch.nn.Linear(8, 6)
    layer = glue.Lora(base, rank=2, alpha=4.0)
    x = torch.randn(5, 8)
    assert torch.equal(layer(x), base(x))
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"a", "b"}
    with torch.no_grad():
        layer.b.normal_()
    merged = base.weight + 2.0 * layer.b @ layer.a
    assert torch.allclose(layer(x), torch.nn.functional.linear(x, merged, base.bias), atol=1e-5)
