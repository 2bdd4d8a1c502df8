"""No ordinary way of saving a converted model writes int8 codes where others expect weights."""

import copy
import gc
import json
import pickle
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import qgalore
from qgalore.errors import ConfigError


@pytest.fixture
def trained(tiny_llama, token_batches):
    """A converted model after two steps, far from its start."""
    model = tiny_llama()
    qgalore.convert(model, rank=8)
    optimizer = qgalore.optimizer(model, lr=2e-2)
    for tokens in token_batches(steps=2):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def assert_computes(model, folder, tokens) -> None:
    """What from_pretrained loads from ``folder`` gives the model's logits but for bf16 weights."""
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        ours, theirs = model(tokens).logits, loaded(tokens).logits
    assert float((ours - theirs).norm() / ours.norm()) < 0.02


def test_save_pretrained_writes_what_save_writes(trained, token_batches, tmp_path):
    trained.save_pretrained(tmp_path / "own", state_dict=trained.state_dict())
    qgalore.save(trained, tmp_path / "save")
    for path in (tmp_path / "save").iterdir():
        assert (tmp_path / "own" / path.name).read_bytes() == path.read_bytes(), path.name
    assert_computes(trained, tmp_path / "own", token_batches()[0])


def test_copies_and_pickles_save_themselves_and_nothing_keeps_a_model_alive(trained, tmp_path):
    twin, again = copy.deepcopy(trained), pickle.loads(pickle.dumps(trained))
    with torch.no_grad():
        twin.model.norm.weight.fill_(3)
        again.model.norm.weight.fill_(4)
    for name, model, value in (("a", trained, None), ("b", twin, 3), ("c", again, 4)):
        model.save_pretrained(tmp_path / name)
        norm = load_file(tmp_path / name / "model.safetensors")["model.norm.weight"]
        assert torch.equal(norm, model.model.norm.weight.bfloat16())
        assert value is None or bool((norm == value).all())
    watch = weakref.ref(twin)
    gc.disable()
    try:
        del twin, model
        assert watch() is None
    finally:
        gc.enable()


def test_shards_have_an_index_and_replace_what_was_saved_before(trained, token_batches, tmp_path):
    trained.save_pretrained(tmp_path / "s")
    (tmp_path / "s" / "notes.txt").write_text("mine")
    trained.save_pretrained(tmp_path / "s", max_shard_size="50KB")
    assert not (tmp_path / "s" / "model.safetensors").exists()
    assert len(list((tmp_path / "s").glob("model-*.safetensors"))) > 1
    assert_computes(trained, tmp_path / "s", token_batches()[0])
    assert (tmp_path / "s" / "notes.txt").read_text() == "mine"


def test_a_saved_state_dict_is_not_taken_for_weights(trained, tiny_llama, tmp_path):
    """Neither with the model's own config nor with that of the folder it came from: no name of the architecture holds
    codes. It loads into a converted model."""
    state = trained.state_dict()
    assert not [name for name, value in state.items() if value.dtype == torch.int8 and name.endswith(".weight")]
    folder = tmp_path / "s"
    folder.mkdir()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    trained.config.save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"qgalore\.save"):
        AutoModelForCausalLM.from_pretrained(folder)
    tiny_llama().config.save_pretrained(folder)
    _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert {name for name in info["missing_keys"] if name.endswith("q_proj.weight")}

    for load in (lambda m: m.load_state_dict(state), lambda m: qgalore.load(m, folder)):
        other = tiny_llama()
        qgalore.convert(other, rank=8)
        load(other)
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in state.items())


def test_the_config_that_a_model_was_built_from_stays_plain(tmp_path):
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=64, **shape)
    converted, plain = LlamaForCausalLM(config), LlamaForCausalLM(config)
    qgalore.convert(converted, rank=4)
    assert converted.config is converted.model.config is converted.model.layers[0].self_attn.config
    plain.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize("guard", [True, False])
def test_trainer_saves_weights_and_resumes_from_its_checkpoints(tiny_llama, token_batches, tmp_path, guard):
    def trainer():
        model = tiny_llama()
        qgalore.convert(model, rank=8)
        rows = [{"input_ids": row, "labels": row} for row in torch.cat(token_batches())]
        options = {"max_grad_norm": 0, "report_to": [], "use_cpu": True, "disable_tqdm": True, "max_steps": 4}
        arguments = TrainingArguments(str(tmp_path / "t"), save_steps=2, logging_strategy="no", **options)
        pair = (qgalore.optimizer(model, lr=1e-2), None)
        callbacks = [qgalore.TrainerGuard()] if guard else []
        return Trainer(model, arguments, train_dataset=rows, optimizers=pair, callbacks=callbacks)

    whole = trainer()
    whole.train()
    whole.save_model(str(tmp_path / "saved"))
    assert_computes(whole.model.eval(), tmp_path / "saved", token_batches()[0])
    with pytest.raises((ValueError, KeyError), match="qgalore"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "t" / "checkpoint-2")
    shutil.rmtree(tmp_path / "t" / "checkpoint-4")
    again = trainer()
    again.train(resume_from_checkpoint=True)
    state = again.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in whole.model.state_dict().items())


@pytest.mark.parametrize("option", [{"variant": "fp16"}, {"push_to_hub": True}, {"distributed_checkpoint": True}])
def test_what_it_cannot_follow_is_refused(trained, tmp_path, option):
    with pytest.raises(ConfigError, match=rf"{next(iter(option))}.*qgalore\.save"):
        trained.save_pretrained(tmp_path, **option)
    other = {name: value.clone() for name, value in trained.state_dict().items()}
    with pytest.raises(ConfigError, match=r"state_dict.*qgalore\.save"):
        trained.save_pretrained(tmp_path, state_dict=other)


def test_a_failed_save_leaves_the_folder_as_it_was(trained, tmp_path, monkeypatch):
    """Permissions of a new file are those of any other; a disk without room is found before anything is written."""
    trained.save_pretrained(tmp_path / "s")
    before = {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()}
    assert len({path.stat().st_mode for path in (tmp_path / "s").iterdir()}) == 1
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(ConfigError, match=r"MiB free"):
        trained.save_pretrained(tmp_path / "s")
    with pytest.raises(ConfigError, match=r"MiB free"):
        qgalore.save(trained, tmp_path / "new")
    assert {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
