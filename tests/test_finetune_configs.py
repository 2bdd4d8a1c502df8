"""The configurations for fine-tuning: their plans with a model folder's config.json, and the sample conversations."""

import json

import pytest
from helpers import assert_header_is

from qgalore import config
from qgalore.data.conversations import conversations
from qgalore.errors import ConfigError
from qgalore.memory import streamed
from qgalore.memory.resident import make_states, resident
from qgalore.models.presets import PRESETS
from qgalore.training import assemble
from qgalore.training.model import Vocabulary
from qgalore.training.paper import on_paper, plan_for

GIB = 2**30


@pytest.mark.parametrize(
    ("name", "preset", "limit"), [("llama3_8b", "llama3_8b", 10.0), ("qwen2.5_7b", "qwen2.5_7b", 9.7)]
)
def test_resident_bytes_from_a_config_json_alone(tmp_path, name, preset, limit):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **PRESETS[preset]}))
    made = config.load(f"finetune_{name}_16gb", [f"model.path={tmp_path}", "train.activation_checkpointing=true"])
    model, optimizer = on_paper(config.resolve(made, "cuda", True), Vocabulary(1, None, None))
    sizes = resident(model, optimizer.tensors)
    assert sizes["int8 weights"] > 7 * GIB
    assert sum(sizes.values()) < limit * GIB


def test_a_32b_streams_its_blocks_and_moments_within_its_budgets(tmp_path):
    """The records of its 64 blocks, and what is left for the card."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **PRESETS["qwen3_32b"]}))
    made = config.resolve(config.load("finetune_qwen3_32b_16gb", [f"model.path={tmp_path}"]), "cuda", True)
    assert made.data.task == "instruct"
    model, optimizer = on_paper(made, Vocabulary(1, None, None))
    make_states(optimizer.tensors)
    found = streamed.on_paper(model, streamed.blocks_to_stream(model), optimizer.tensors, made.memory.slots, state=True)
    weights = 5120 * (2 * 8192 + 2 * 1024 + 3 * 25600)  # of a block, one byte each
    assert len(found.records) == 64
    assert 64 * weights < found.host_bytes < config.bytes_of(made.memory.host_budget) == 40e9
    kept = sum(resident(model, optimizer.tensors, found.storages()).values())
    assert kept + sum(found.on_device().values()) < 3.2 * GIB


# All but the one whose plan the README's own command prints, which test_readme.py holds to its header.
HEADERS = [path for path in sorted(config.PACKAGED.glob("*b_*gb.yaml")) if path.name != "llama7b_16gb.yaml"]


@pytest.mark.slow
@pytest.mark.parametrize("path", HEADERS, ids=lambda path: path.stem)
def test_headers_are_what_plan_prints(path, tmp_path, capsys):
    given = []
    if path.stem.startswith("finetune_"):
        preset = path.stem.removeprefix("finetune_").removesuffix("_16gb")
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **PRESETS[preset]}))
        given = [f"model.path={tmp_path}"]
    assemble.plan(config.load(str(path), given))
    assert_header_is(capsys.readouterr().out, path)


@pytest.mark.parametrize("name", ["llama3_8b", "qwen2.5_7b", "qwen3_32b"])
def test_a_folder_that_is_not_there_is_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = config.load(f"finetune_{name}_16gb")
    assert made.data.task == "instruct"
    with pytest.raises(ConfigError, match=r"model\.path .* has no config\.json"):
        plan_for(config.resolve(made, "cuda", True), Vocabulary(1, None, None), "cuda")


def test_the_sample_conversations():
    folder = config.PACKAGED / "instruct_data"
    train, valid = ([rows for rows, _ in conversations(str(folder / f"{n}.jsonl"))] for n in ("train", "valid"))
    assert (len(train), len(valid)) == (80, 12)
    for rows in (*train, *valid):
        roles = [turn["role"] for turn in rows]
        start = int(roles[0] == "system")
        assert roles[start:] == ["user", "assistant"] * ((len(roles) - start) // 2)
        assert all(turn["content"].strip() == turn["content"] != "" for turn in rows)
    assert len({json.dumps(rows) for rows in train}) == len(train)
    asked = {rows[-2]["content"] for rows in train}
    assert not [rows for rows in valid if rows[-2]["content"] in asked]
