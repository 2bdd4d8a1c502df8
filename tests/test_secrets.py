"""Tokens and passwords: none gets into a configuration, and none is shown."""

import random
import string
import uuid
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
    "data.valid=https://me:ge/heim@example.org/r.jsonl": "data.valid is https://[secret]@example.org/r.jsonl",
    "data.valid=https://me:geheim@geheim@example.org/r": "data.valid is https://[secret]@example.org/r",
    "data.valid=https://me:%67eheim%2Fgeheim@example.org/r": "data.valid is https://[secret]@example.org/r",
    "data.valid=https://a.org/?to=https%3A%2F%2Fme%3Ageheim%40b.org": "https://a.org/?to=https%3A%2F%2F[secret]%40b.org",
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
        "https://example.org:8443/a@b",
        "s3://bucket/rows:v1@2",
        "hf_datasetsforinstructiontuning",
        "sk-models-from-the-lab/sk-learn_2024_some_long_name_of_a_folder",
        "mask-0123456789abcdef0123456789abcdef",
        "AKIAMODELS.txt",
    ],
)
def test_ordinary_names_pass(file, value):
    assert config.load(file, [f"data.train={value}"]).data.train[0].path == value


LETTERS = string.ascii_letters + string.digits
UPPER, HEX = string.ascii_uppercase + string.digits, "0123456789abcdef"
KINDS = (
    ("sk-", 48, LETTERS), ("sk-", 32, HEX), ("sk-proj-", 60, LETTERS + "-_"), ("sk-ant-api03-", 90, LETTERS + "-_"),
    ("sk-or-v1-", 64, HEX), ("sk_live_", 24, LETTERS), ("hf_", 34, LETTERS), ("ghp_", 36, LETTERS),
    ("gho_", 36, LETTERS), ("github_pat_", 82, LETTERS + "_"), ("AKIA", 16, UPPER), ("ASIA", 16, UPPER),
    ("glpat-", 20, LETTERS), ("AIza", 35, LETTERS),
)  # fmt: skip


@pytest.mark.parametrize(("beginning", "length", "letters"), KINDS, ids=[f"{kind[0]}{kind[1]}" for kind in KINDS])
def test_keys_are_known_by_their_beginning(beginning, length, letters):
    rng = random.Random(beginning)
    for around in ("{}", "s3://bucket/{}/rows", "key is {}, or", "https://example.org/?{}"):
        for _ in range(20):
            token = beginning + "".join(rng.choices(letters, k=length - 2)) + ("B3" if "B" in letters else "b3")
            assert without_secrets(around.format(token)) == around.format("[secret]")


def test_what_comes_with_qgalore_and_the_names_that_hubs_and_caches_give_are_no_secrets():
    for path in config.PACKAGED.glob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        assert without_secrets(text) == text, path
    rng = random.Random(0)
    for _ in range(300):
        digits = "".join(rng.choices(HEX, k=rng.choice([8, 12, 32, 40, 64])))
        a, b = rng.choices(["meta-llama", "sk-lab", "sk-2024-old", "hf-internal-testing", "Qwen", "risk"], k=2)
        for text in (
            f"{a}/{b}-{rng.randrange(99)}B-Instruct-v{rng.random():.1f}", f"cache/{digits}", f"/data/{a}_{digits}",
            f"~/.cache/hub/models--{a}--{b}/snapshots/{digits}", f"https://{a}.org/{b}@{digits}",
            f"runs/{b}/checkpoints/step-{rng.randrange(10**8):08d}", str(uuid.UUID(int=rng.getrandbits(128))),
        ):  # fmt: skip
            assert without_secrets(text) == text


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
