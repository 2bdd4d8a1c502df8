"""Folders that are no plain model: named in one sentence, with what to start from instead."""

import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, OPTConfig, RobertaConfig

from qgalore.errors import ConfigError
from qgalore.files import export_int8
from qgalore.models import loading, streaming
from qgalore.models.causality import check_causal
from qgalore.models.convert import convert

CPU = torch.device("cpu")


@pytest.fixture
def folder(tiny_llama, tmp_path):
    tiny_llama(pad_token_id=None).save_pretrained(tmp_path)
    return tmp_path


def edit(folder, drop=(), **fields) -> None:
    path = folder / "config.json"
    content = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({k: v for k, v in content.items() if k not in drop}))


def skeleton(folder, lines=None):
    report = (lines if lines is not None else []).append
    return loading.pretrained_skeleton(loading.local_folder(str(folder)), dtype=torch.float32, report=report)


@pytest.mark.parametrize(
    ("quantization", "name"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "FP8"),
        ({"quant_method": "gptq", "bits": 4}, "GPTQ"),
        ({"quant_method": "awq", "bits": 4}, "AWQ"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        (
            {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}},
            "compressed-tensors",
        ),
        ({"quant_method": "something_new"}, "something_new"),
        ("torchao", "torchao"),
    ],
)
def test_quantized_folders(folder, quantization, name):
    edit(folder, quantization_config=quantization)
    with pytest.raises(ConfigError, match=rf"holds .*{name}.* weights, which cannot be trained\. Start from"):
        skeleton(folder)


def test_adapters(folder):
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base"}))
    with pytest.raises(ConfigError, match=r"is an adapter.*base model \(some/base\)"):
        skeleton(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match="is an adapter"):
        skeleton(folder)


def test_gguf_files_and_folders(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    for source in (tmp_path, tmp_path / "m.gguf"):
        with pytest.raises(ConfigError, match="is a GGUF model"):
            loading.local_folder(str(source))


@pytest.mark.parametrize(
    "stated", [{"AutoConfig": "odd.Odd", "AutoModelForCausalLM": "odd.Model"}, {"AutoModel": "odd.M"}]
)
def test_code_beside_a_model_never_runs(folder, stated, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    (folder / "odd.py").write_text("raise SystemExit('it ran')\n")
    edit(folder, auto_map=stated)
    lines = []
    assert not hasattr(skeleton(folder, lines).config, "auto_map")  # transformers knows this architecture itself
    assert any("does not run" in line for line in lines)
    edit(folder, model_type="odd")
    with pytest.raises(ConfigError, match=r"own Python code \(odd\.py\), which qgalore never runs"):
        skeleton(folder)
    with pytest.raises(ConfigError, match="never runs"):
        loading.model_config(str(folder), tokenizer_size=96, overrides={})
    assert not [name for name in sys.modules if name.rpartition(".")[2] == "odd"]


def exported(model, tmp_path):
    """``model``'s int8 export, without a tokenizer."""

    export_int8.save(model, None, tmp_path, report=lambda line: None)
    return tmp_path


@pytest.mark.parametrize("group", [32, "row"])
def test_the_int8_export_is_taken_over_as_it_is(tiny_llama, tmp_path, group):
    source = tiny_llama(tie_word_embeddings=False)
    convert(source, rank=8, group_size=group)
    exported(source, tmp_path)
    model = skeleton(tmp_path)
    assert not hasattr(model.config, "quantization_config")
    tensors = loading.stored_source(tmp_path, model, report=pytest.fail)
    convert(model, rank=8, group_size=group)
    streaming.allocate(model, CPU)
    assert streaming.fill(model, tensors, "model") == []
    for name, value in source.state_dict().items():
        if name.endswith(("proj.weight", "weight_scale")):
            assert torch.equal(value, model.state_dict()[name]), name


def test_other_groups_are_quantized_anew_and_counted(tiny_llama, tmp_path):
    source = tiny_llama()
    convert(source, rank=8, group_size="row")
    exported(source, tmp_path)
    model = skeleton(tmp_path)
    tensors = loading.stored_source(tmp_path, model, report=pytest.fail)
    convert(model, rank=8, group_size=32)
    streaming.allocate(model, CPU)
    assert len(streaming.fill(model, tensors, "model")) == 14
    one, other = (m.model.layers[1].mlp.up_proj for m in (source, model))
    steps = other.weight_scale.float().repeat_interleave(32, 1)
    assert ((one.dense_weight() - other.dense_weight()).abs() <= steps / 2 * 1.001).all()


def test_the_int8_export_evaluates_as_the_integers_say(tiny_llama, tmp_path):
    source = tiny_llama()
    convert(source, rank=8)
    model = loading.pretrained(str(exported(source, tmp_path)), dtype=torch.float32)
    for name, layer in ((n, m) for n, m in source.named_modules() if hasattr(m, "dense_weight")):
        assert torch.equal(model.get_submodule(name).weight, layer.dense_weight())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 0}, "hidden_size is 0; it must be at least 1"),
        ({"intermediate_size": -4}, "intermediate_size is -4"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1,000,000,000, more than any model has"),
        ({"vocab_size": 2**40}, "vocab_size is"),
        ({"head_dim": 10**12}, "head_dim is"),
        ({"num_attention_heads": 2.5}, "num_attention_heads is 2.5; it must be a whole number"),
        ({"num_key_value_heads": True}, "num_key_value_heads is True"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf"),
        ({"attention_dropout": float("nan")}, "attention_dropout is not a number"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": -1}}, "rope_theta is -1"),
        ({"rms_norm_eps": 1e30}, "rms_norm_eps is 1e.30; it must be below 1"),
        ({"attention_dropout": -0.5}, "attention_dropout is -0.5; it must be a share"),
        ({"attention_dropout": 1}, "attention_dropout is 1; it must be a share"),
        ({"rope_parameters": {"rope_type": "linear", "factor": -4.0}}, "factor is -4.0; it must be a number above"),
        ({"num_attention_heads": 3}, r"cannot be loaded.*multiple of the number of attention"),
        ({"rope_parameters": 3}, "cannot be loaded"),
        ({"layer_types": ["odd"]}, "cannot be loaded"),
        ({"pad_token_id": 96}, "pad_token_id is 96, and the vocabulary has ids 0 to 95"),
        ({"eos_token_id": "end"}, "eos_token_id is 'end'"),
        ({"hidden_act": "nothing"}, "cannot be built"),
        ({"model_type": ["llama"]}, "cannot be loaded"),
    ],
)
def test_config_json_is_refused_by_name(folder, fields, message):
    edit(folder, **fields)
    with pytest.raises(ConfigError, match=message):
        skeleton(folder)


@pytest.mark.parametrize("text", ["[]", "3", "{", "[" * 100_000, "\xff"])
def test_config_json_that_is_no_object(folder, text):
    (folder / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"config\.json"):
        skeleton(folder)


def test_odd_ids_are_said_and_infinity_is_read(folder):
    edit(folder, eos_token_id=[2, 4000], pad_token_id=-1, some_limit={"__float__": "Infinity"})
    lines = []
    model = skeleton(folder, lines)
    assert model.config.some_limit == float("inf")
    assert [line.partition(": ")[2] for line in lines] == [
        "pad_token_id -1 is no id of the vocabulary (0 to 95)",
        "eos_token_id 4000 is no id of the vocabulary (0 to 95)",
    ]
    made = loading.model_config(str(folder), tokenizer_size=96, overrides={})
    assert made.some_limit == float("inf")


def test_positions_that_roberta_cannot_use():
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = RobertaConfig(vocab_size=50, max_position_embeddings=34, pad_token_id=1, is_decoder=True, **shape)
    model = loading.skeleton(config, dtype=torch.float32)
    assert loading.first_position(model) == 2
    loading.check_positions(model, 32)
    with pytest.raises(ConfigError, match=r"32 usable positions \(max_position_embeddings is 34\)"):
        loading.check_positions(model, 33)
    whole = AutoModelForCausalLM.from_config(config)
    whole(torch.full((1, 32), 5))
    with pytest.raises((IndexError, RuntimeError)):
        whole(torch.full((1, 33), 5))
    wide = OPTConfig(vocab_size=50, max_position_embeddings=34, ffn_dim=32, word_embed_proj_dim=32, **shape)
    loading.check_positions(loading.skeleton(wide, dtype=torch.float32), 34)


def test_encoders_are_no_language_models(tiny_llama):
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    for decoder in (True, False):
        model = AutoModelForCausalLM.from_config(
            BertConfig(vocab_size=50, is_decoder=decoder, initializer_range=0.2, **shape)
        )
        model.eval()
        if decoder:
            check_causal(model)
        else:
            with pytest.raises(ConfigError, match="lets a token see the tokens after it"):
                check_causal(model)
    check_causal(tiny_llama().eval())
