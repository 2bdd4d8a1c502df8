"""What is wrong and can be known is said before a tokenizer is trained or a token is written."""

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from qgalore.data.tokenizer import train_tokenizer


@pytest.fixture
def known_texts():
    """None: whether something is made is what these tests are about."""


def nothing_made() -> bool:
    return not Path("cache").exists() or not any(Path("cache").iterdir())


@pytest.fixture
def pretrained(tmp_path):
    """The folder of a small model."""
    folder = tmp_path / "model"
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**shape, vocab_size=320, max_position_embeddings=64)).save_pretrained(folder)
    train_tokenizer(["the sea"] * 3, vocab_size=270, report=lambda line: None).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.valid=vaild.jsonl"], "data.valid: data source 'vaild.jsonl' does not exist"),
        (["data.train=nowhere.jsonl"], "data.train: data source 'nowhere.jsonl' does not exist"),
        (["data.valid=table.csv"], "data.valid: data source 'table.csv' has an ending that is not read here"),
        (["data.valid=rows.jsonl", "data.text_key=body"], "has no 'body'"),
        (["data.task=instruct", "data.train=rows.jsonl"], "data.train: 'rows.jsonl' line 1 has the keys 'text'"),
        (["data.tokenizer=none.json"], "data.tokenizer: 'none.json' does not exist"),
        (["data.cache_dir=table.csv/cache"], "data.cache_dir: "),
        (["data.vocab_size=100"], "data.vocab_size is 100; it must be"),
        (["model.config=llama_quikstart"], "did you mean llama_quickstart?"),
        (["model.overrides.hiden_size=64"], "did you mean hidden_size?"),
        (["train.optimizer=torch.optim.Adamm"], "torch.optim.Adamm"),
        (["train.optimizer=torch.optim.SGD", "train.optimizer_options.momentun=0.9"], "momentun"),
    ],
)
def test_before_anything_is_made(tiny_run, overrides, said):
    Path("rows.jsonl").write_text('{"text": "the sea"}\n' * 9)
    Path("table.csv").write_text("x\n")
    code, _, err = tiny_run(*overrides)
    assert code == 2
    assert said in err
    assert nothing_made()


def test_a_stored_model_is_looked_at_before_its_data(tiny_run, pretrained):
    weights = pretrained / "model.safetensors"
    whole = weights.read_bytes()
    arguments = ("model.config=null", "model.overrides={}", f"model.path={pretrained}")
    for damaged in (whole[: len(whole) // 2], b"", whole[:4] + b"\xff" * 4 + whole[8:]):
        weights.write_bytes(damaged)
        code, _, err = tiny_run(*arguments)
        assert code == 2, err
        assert nothing_made()


def test_a_damaged_tokenizer_is_trained_again(tiny_run):
    Path("rows.jsonl").write_text("".join(json.dumps({"text": f"the old sea {n} " * 8}) + "\n" for n in range(30)))
    arguments = ("data.train=rows.jsonl", "data.vocab_size=270", "train.max_steps=1", "export.formats=[]")
    code, out, err = tiny_run(*arguments)
    assert code == 0, err
    assert "characters read; choosing the entries" in out
    (kept,) = Path("cache").glob("tokenizer-*")
    vocabulary = (kept / "tokenizer.json").read_bytes()
    (kept / "tokenizer.json").write_bytes(vocabulary[:-100])
    code, out, err = tiny_run(*arguments, "run.name=second")
    assert code == 0, err
    assert "is damaged" in out
    assert (kept / "tokenizer.json").read_bytes() == vocabulary
    assert "cached" in tiny_run(*arguments, "run.name=third")[1]
    assert len(list(Path("cache").iterdir())) == 2  # nothing is left beside tokenizer and tokens


def test_a_held_out_end_that_is_too_short_has_a_remedy_that_works(tiny_run):
    Path("rows.jsonl").write_text("".join(json.dumps({"text": f"the old sea {n} " * 8}) + "\n" for n in range(30)))
    arguments = ("data.train=rows.jsonl", "data.vocab_size=270", "train.max_steps=1", "export.formats=[]")
    code, _, err = tiny_run(*arguments, "data.valid_fraction=0.001", "data.sequence_length=128")
    assert code == 2
    assert "data.valid_fraction is 0.001" in err
    remedy = err.split("set data.valid_fraction to ")[1].split(",")[0]
    code, _, err = tiny_run(*arguments, f"data.valid_fraction={remedy}", "data.sequence_length=128")
    assert code == 0, err


def test_a_changed_corpus_is_noticed_wherever_it_changed(tiny_run):
    rows = [json.dumps({"text": f"number {n} of the old sea"}) + "\n" for n in range(3000)]
    Path("rows.jsonl").write_text("".join(rows))
    arguments = ("data.train=rows.jsonl", "data.vocab_size=300", "train.max_steps=1", "export.formats=[]")
    arguments += ("data.tokenizer=tokenizer",)
    train_tokenizer(rows[:50], vocab_size=300, report=lambda line: None).save_pretrained("tokenizer")
    assert tiny_run(*arguments)[0] == 0
    for changed in (60, 61, 1444):
        other = [*rows]
        other[changed] = other[changed].replace("old", "new")
        Path("rows.jsonl").write_text("".join(other))
        code, _, err = tiny_run(*arguments, "--resume", "auto")
        assert code == 2
        assert "made with other tokens" in err
