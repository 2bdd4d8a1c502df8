"""Tokens and passwords: none gets into a configuration, and none is shown."""

from pathlib import Path

import pytest
import yaml

from qgalore import config
from qgalore.cli import door
from qgalore.errors import ConfigError, without_secrets

TOKEN = "hf_" + "abcDEF0123" * 3
GIVEN = {
    "data.train=https://me:geheim@example.org/rows.jsonl": "data.train is https://[secret]@example.org/rows.jsonl",
    "data.valid=https://geheim@example.org/rows.jsonl": "data.valid is https://[secret]@example.org",
    "data.valid=https://example.org/r.jsonl?download=1&access_token=geheim": "data.valid is https://example.org/r.jsonl?",
    "model.path=s3://bucket/model?X-Amz-Signature=geheim": "model.path is s3://bucket/model?[secret]",
    "data.valid=https://example.org/r?sv=1&sig=geheim": "data.valid is https://example.org/r?sv=1&[secret]",
    "model.overrides={note: 'https://example.org/#auth=geheim'}": "note is https://example.org/#[secret]",
    f"data.cache_dir=ghp_{'aB3d' * 9}": "data.cache_dir is [secret]",
    f"data.tokenizer=https://huggingface.co/a/b/{TOKEN}": "data.tokenizer is https://huggingface.co/a/b/[secret]",
    f"model.overrides={{note: [{TOKEN}]}}": "model.overrides.note[0] is [secret]",
    "run.dir=/data/geheim-of-this-machine": "run.dir is /data/[secret]",
}


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "geheim-of-this-machine")
    monkeypatch.chdir(tmp_path)
    model = {"config": "llama_quickstart"}
    text = yaml.safe_dump({"model": model, "data": {"train": "a.txt"}, "train": {"max_steps": 1, "lr": 0.1}})
    Path("tiny.yaml").write_text(text)
    return "tiny.yaml"


@pytest.mark.parametrize(("override", "shown"), GIVEN.items(), ids=[given.split("=")[0] for given in GIVEN])
def test_a_configuration_with_a_secret_is_refused_without_showing_it(file, override, shown):
    overrides = [override] if not override.startswith("model.path") else [override, "model.config=null"]
    with pytest.raises(ConfigError) as error:
        config.load(file, overrides)
    assert shown in str(error.value)
    assert "set HF_TOKEN" in str(error.value)
    assert "geheim" not in str(error.value)
    assert TOKEN not in str(error.value)


@pytest.mark.parametrize(
    "value",
    [
        "data/user@host/rows.jsonl",
        "allenai/c4:en",
        "https://example.org/rows.jsonl?download=true",
        "hf_rows.txt",
        "https://example.org/?monkey=1&max_tokens=9",
    ],
)
def test_ordinary_names_pass(file, value):
    assert config.load(file, [f"data.train={value}"]).data.train[0].path == value


@pytest.mark.parametrize("key", ["train.lr", "train.lr.x", "data.train.x", "run.name"])
def test_a_long_secret_is_hidden_before_a_message_is_cut(file, key):
    with pytest.raises(ConfigError) as error:
        config.load(file, [f"{key}=https://me:{'geheim' * 20}@example.org/rows.jsonl"])
    assert "geheim" not in str(error.value)
    assert "https://[secret]@example.org" in str(error.value)


def test_messages_at_the_door_hide_what_they_quote(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "tok-123456789")

    def work():
        raise ConfigError(f"401 for https://u:pw@hub/x?token=q with tok-123456789 and {TOKEN}; log in")

    assert door.leave(work) == 2
    err = capsys.readouterr().err
    assert err == "error: 401 for https://[secret]@hub/x?[secret] with [secret] and [secret]; log in\n"


def test_short_values_of_the_environment_are_no_secrets(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a")
    assert without_secrets("a cat") == "a cat"
