"""A streamed model is the one that transformers would have built or loaded whole."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from qgalore.errors import ConfigError
from qgalore.models import loading, streaming
from qgalore.models.convert import convert

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97}
SHAPES = {
    "llama": SMALL,
    "llama tied": {**SMALL, "tie_word_embeddings": True, "pad_token_id": 3},
    "mistral": {**SMALL, "num_key_value_heads": 2},
    "qwen2": {**SMALL, "num_key_value_heads": 2},
    "gemma2": {**SMALL, "num_key_value_heads": 2, "head_dim": 16},
    "phi": SMALL,
    "gpt_neox": SMALL,
    "opt": {**SMALL, "word_embed_proj_dim": 64, "ffn_dim": 96},
    "mixtral": {**SMALL, "num_key_value_heads": 2, "num_local_experts": 3},
    "qwen3_moe": {
        **SMALL,
        "num_key_value_heads": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
    },
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 97},
}
CPU = torch.device("cpu")


def config_of(name: str, **changes):
    fields = SHAPES.get(name, {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 97})
    return AutoConfig.for_model(name.split()[0], **{**fields, **changes})


def streamed(config, seed=5, dtype=torch.float32, lines=None) -> nn.Module:
    model = loading.skeleton(config, dtype=dtype)
    source = loading.fresh_source(model, seed=seed, report=(lines if lines is not None else []).append)
    streaming.allocate(model, CPU)
    streaming.fill(model, source, "model")
    return model


def initialised(config, seed=5) -> nn.Module:
    """A model built whole, initialised by transformers from ``seed`` (its construction drew numbers), then tied."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())
    for module in model.modules():
        module.__dict__.pop("_is_hf_initialized", None)
    torch.manual_seed(seed)
    model.initialize_weights()
    model.tie_weights()
    return model


def assert_same(one: nn.Module, other: nn.Module) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert set(first) == set(second)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    buffers = dict(other.named_buffers())
    for name, value in one.named_buffers():
        assert torch.equal(value, buffers[name]), name


@pytest.mark.parametrize("name", SHAPES)
def test_fresh_models_equal_transformers_own(name, monkeypatch):
    """Bit for bit in fp32, tiles and all: the distributions, their order and the buffers are those of transformers."""
    monkeypatch.setattr(streaming, "TILE_ELEMENTS", 2048)
    lines = []
    got = streamed(config_of(name), lines=lines)
    wanted = initialised(config_of(name))
    assert not lines
    assert_same(got, wanted)
    ids = torch.arange(8)[None]
    assert torch.equal(got.eval()(ids).logits, wanted.eval()(ids).logits)
    tied = wanted.get_input_embeddings().weight is wanted.get_output_embeddings().weight
    assert tied == (got.get_input_embeddings().weight is got.get_output_embeddings().weight)


def test_weights_initialised_twice_have_the_last_distribution():
    """GPT-2 gives some projections a smaller spread after the usual one; only the order of the draws differs."""
    config = config_of("gpt2", n_embd=128, n_layer=8)
    got, wanted = streamed(config), initialised(config)
    for name, value in wanted.named_parameters():
        mine = got.get_parameter(name)
        if value.std() > 0:  # the spread of n normal draws has a relative error of (2n)^-1/2; six of them
            assert abs(float((mine.std() / value.std()).detach()) - 1) < 6 * (2 * value.numel()) ** -0.5 * 2**0.5
        else:
            assert torch.equal(mine, value)
    small, usual = (wanted.transformer.h[0].attn.get_submodule(name).weight.std() for name in ("c_proj", "c_attn"))
    if small < usual / 2:  # transformers 5.6 does not get to the second of its own two draws
        small, usual = (got.transformer.h[0].attn.get_submodule(name).weight.std() for name in ("c_proj", "c_attn"))
        assert small < usual / 2


def test_what_cannot_be_streamed_is_built_whole_and_said():
    config = AutoConfig.for_model("mamba", hidden_size=64, num_hidden_layers=2, vocab_size=97)
    lines = []
    got = streamed(config, lines=lines)
    assert len(lines) == 1
    assert "built whole in host memory first" in lines[0]
    assert_same(got, loading.from_scratch(config, dtype=torch.float32, seed=5))


def test_bf16_is_one_rounding_of_fp32():
    wide, narrow = streamed(config_of("llama")), streamed(config_of("llama"), dtype=torch.bfloat16)
    for name, value in wide.named_parameters():
        assert torch.equal(value.to(torch.bfloat16), narrow.get_parameter(name))


@pytest.mark.parametrize("name", ["llama", "llama tied", "gpt2", "opt", "mixtral", "qwen3_moe"])
def test_converting_before_or_after_filling_is_the_same(name, monkeypatch):
    """int8 weights and scales of a skeleton filled row by row equal those of a whole model converted."""
    monkeypatch.setattr(streaming, "TILE_ELEMENTS", 2048)
    model = loading.skeleton(config_of(name), dtype=torch.float32)
    source = loading.fresh_source(model, seed=5, report=print)
    report = convert(model, rank=8)
    streaming.allocate(model, CPU)
    streaming.fill(model, source, "model")
    whole = streamed(config_of(name))
    assert str(convert(whole, rank=8)) == str(report)
    assert_same(model, whole)
    assert all(leaf.untyped_storage().nbytes() == 4 for n, leaf in model.named_parameters() if n.endswith("delta"))
    model.eval()(torch.arange(8)[None]).logits.sum().backward()


def read(folder, dtype=torch.float32, lines=None):
    model = loading.pretrained_skeleton(folder, dtype=dtype)
    source = loading.stored_source(folder, model, report=(lines if lines is not None else []).append)
    streaming.allocate(model, CPU)
    streaming.fill(model, source, "model")
    return model


@pytest.mark.parametrize("name", [*SHAPES, "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folders_equal_transformers_own_loading(name, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "TILE_ELEMENTS", 2048)
    loading.from_scratch(config_of(name), dtype=torch.float32, seed=1).save_pretrained(tmp_path, max_shard_size="40KB")
    lines = []
    got = read(tmp_path, dtype, lines)
    # after transformers 5.6 GPT-NeoX's head has a new name in the model and the old one in the file
    renamed = name == "gpt_neox" and "lm_head.weight" in got.state_dict()
    assert [line.split(" is built whole")[0] for line in lines] == ["GPTNeoXForCausalLM"] * renamed
    assert_same(got, AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_folders_with_stacked_experts(name, tmp_path):
    """The other layout that transformers writes, its own in memory. (The hub's is tested with the others.)"""
    model = loading.from_scratch(config_of(name), dtype=torch.float32, seed=1)
    model.save_pretrained(tmp_path, save_original_format=False)
    assert any(key.endswith("experts.down_proj") for key in load_file(tmp_path / "model.safetensors"))
    lines = []
    assert_same(read(tmp_path, lines=lines), model)
    assert not lines


def test_a_folder_without_one_expert_is_refused(tmp_path):
    loading.from_scratch(config_of("mixtral"), dtype=torch.float32, seed=1).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="automatic conversion"):
        read(tmp_path)


def test_names_without_the_base_models_prefix(tmp_path):
    """Old GPT-2 files name their tensors without "transformer."."""
    model = loading.from_scratch(config_of("gpt2"), dtype=torch.float32, seed=1)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    renamed = {n.removeprefix("transformer."): v for n, v in tensors.items()} | {"surplus": torch.ones(2)}
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    lines = []
    assert_same(read(tmp_path, lines=lines), model)
    assert lines == [f"1 tensor in {tmp_path} has no place in the model and will not be read, for example surplus"]


def test_pickles_and_damage_are_refused(tmp_path):
    model = loading.from_scratch(config_of("llama"), dtype=torch.float32, seed=1)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", whole[:8] + b"\xff" * 64 + whole[72:]):
        shard.write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"cannot be loaded.*damaged"):
            read(tmp_path)
    shard.unlink()
    with pytest.raises(ConfigError, match=f"the shard {shard.name} is missing"):
        read(tmp_path)
    for path in tmp_path.glob("*.safetensors*"):
        path.unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin is a pickle"):
        read(tmp_path)


def test_values_that_are_not_finite_are_refused(tmp_path):
    model = loading.from_scratch(config_of("llama"), dtype=torch.float32, seed=1)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("inf")
    model.save_pretrained(tmp_path)
    skeleton = loading.pretrained_skeleton(tmp_path, dtype=torch.float32)
    source = loading.stored_source(tmp_path, skeleton, report=print)
    convert(skeleton, rank=8)
    streaming.allocate(skeleton, CPU)
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.up_proj\.weight cannot be used"):
        streaming.fill(skeleton, source, "model")


def test_other_shapes_and_missing_tensors_are_refused(tmp_path):
    loading.from_scratch(config_of("llama"), dtype=torch.float32, seed=1).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 80}))
    with pytest.raises(ConfigError, match="mismatched"):
        read(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ConfigError, match="missing keys"):
        read(tmp_path)
