import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from qgalore.data.tokenizer import END_OF_TEXT, load_tokenizer, train_tokenizer
from qgalore.errors import ConfigError

TEXTS = [f"The whale number {n} swam past the ship, and the ship sailed on. " * 3 for n in range(60)]


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(TEXTS, vocab_size=320)


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    trained.save_pretrained(path)
    return path


def test_trained_size_and_specials(trained):
    assert len(trained) == 320
    assert trained.bos_token_id == trained.eos_token_id == trained.pad_token_id == 0
    assert trained.convert_ids_to_tokens(0) == END_OF_TEXT
    assert trained(TEXTS[0])["input_ids"].count(0) == 0
    assert len(trained(TEXTS[0])["input_ids"]) < len(TEXTS[0]) / 2


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60))
def test_saved_tokenizer_round_trips(folder, text):
    for load in (AutoTokenizer.from_pretrained, load_tokenizer):
        tokenizer = load(str(folder))
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("text", ["  two  spaces , and 's", "naïve 鯨 🐋 \n\n\tend ", "\x00 x"])
def test_round_trip_of_awkward_text(folder, text):
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_loaded_equals_trained(trained, folder):
    for path in (folder, folder / "tokenizer.json"):
        loaded = load_tokenizer(str(path))
        assert loaded(TEXTS[3])["input_ids"] == trained(TEXTS[3])["input_ids"]
        assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 0, 0)


def test_training_is_deterministic(trained):
    # In another process, so that hash seeds and thread timing differ.
    program = (
        "import sys; from qgalore.data.tokenizer import train_tokenizer; texts = eval(sys.stdin.read()); "
        "print(train_tokenizer(texts, vocab_size=320).backend_tokenizer.to_str())"
    )
    other = subprocess.run(
        [sys.executable, "-c", program], input=repr(TEXTS), capture_output=True, text=True, check=True
    ).stdout
    assert other.strip() == trained.backend_tokenizer.to_str()


def test_small_corpus_says_what_it_reached():
    lines = []
    tokenizer = train_tokenizer(["abab abab"], vocab_size=1000, report=lines.append)
    assert 257 < len(tokenizer) < 300
    assert len(lines) == 1
    assert f"yields {len(tokenizer)} tokens, not the 1000" in lines[0]


def test_training_errors():
    assert len(train_tokenizer(["ab"], vocab_size=257, report=lambda line: None)) == 257
    with pytest.raises(ConfigError, match=r"vocab_size is 256; .* at least 257"):
        train_tokenizer(["ab"], vocab_size=256)
    with pytest.raises(ConfigError, match="no text to train"):
        train_tokenizer(["", ""], vocab_size=300)


def test_errors_of_the_texts_come_through():
    def texts():
        yield "some text"
        raise ConfigError("line 2 is not valid")

    with pytest.raises(ConfigError, match="line 2 is not valid"):
        train_tokenizer(texts(), vocab_size=300)


def test_lone_file_gets_a_usual_end_token(trained, tmp_path):
    (tmp_path / "tokenizer.json").write_text(trained.backend_tokenizer.to_str(), encoding="utf-8")
    lines = []
    loaded = load_tokenizer(str(tmp_path / "tokenizer.json"), report=lines.append)
    assert loaded.eos_token_id == 0
    assert len(loaded) == 320
    assert "<|endoftext|> is used" in lines[0]


def bare(trained, path, names):
    """A folder with the files ``names`` of a tokenizer and nothing else of it."""
    model = json.loads(trained.backend_tokenizer.to_str())["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    contents = {
        "tokenizer.json": trained.backend_tokenizer.to_str(),
        "vocab.json": json.dumps(model["vocab"]),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
    }
    for name in names:
        (path / name).write_text(contents[name], encoding="utf-8")
    return path


@pytest.mark.parametrize("names", [["tokenizer.json"], ["vocab.json", "merges.txt"]])
@pytest.mark.parametrize("model_type", [None, "llama", "gpt2"])
def test_bare_files_without_a_description(trained, tmp_path, names, model_type):
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "eos_token_id": [0, 5]}))
    lines = []
    loaded = load_tokenizer(str(bare(trained, tmp_path, names)), report=lines.append)
    assert loaded.eos_token_id == 0
    assert len(loaded) == len(trained)
    stated = model_type == "gpt2" and names == ["tokenizer.json"]  # transformers' class has an end itself
    source = "config.json's" if model_type else "a usual name"
    assert [line.rpartition("; ")[2] for line in lines] == [f"{END_OF_TEXT} is used ({source})"] * (not stated)
    for text in (TEXTS[0], "naïve 鯨  two", f"a{END_OF_TEXT}b"):
        assert loaded(text)["input_ids"] == trained(text)["input_ids"]
        assert loaded.decode(loaded(text)["input_ids"]) == text


def test_the_end_that_config_json_states_wins(trained, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 7}))
    loaded = load_tokenizer(str(bare(trained, tmp_path, ["tokenizer.json"])), report=lambda line: None)
    assert loaded.eos_token_id == 7
    for odd in (-1, 320, None):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": odd}))
        assert load_tokenizer(str(tmp_path), report=lambda line: None).eos_token_id == 0


def test_a_sentencepiece_model_alone_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0e")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    with pytest.raises(ConfigError, match=r"tokenizer\.model.*pip install sentencepiece"):
        load_tokenizer(str(tmp_path))


def test_code_beside_a_tokenizer_never_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    (tmp_path / "odd.py").write_text("raise SystemExit('it ran')\n")
    stated = {"tokenizer_class": "OddTokenizer", "auto_map": {"AutoTokenizer": ["odd.OddTokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(stated))
    with pytest.raises(ConfigError, match=r"own Python code, which qgalore never runs.*data\.tokenizer"):
        load_tokenizer(str(tmp_path))


def test_load_errors(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"does not exist\. Close names in that folder: tokenizer\.json"):
        load_tokenizer(str(folder / "tokeniser.json"))
    with pytest.raises(ConfigError, match="no tokenizer could be loaded"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"is not a tokenizer\.json"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))


def test_unknown_hub_id_offline(tmp_path):
    program = (
        "from qgalore.data.tokenizer import load_tokenizer\n"
        "from qgalore.errors import ConfigError\n"
        "try: load_tokenizer('no-such-owner/no-such-model')\n"
        "except ConfigError as error: print(error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    said = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert "'no-such-owner/no-such-model'" in said
    assert "Without network give a local folder" in said
