import json
import re

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import qgalore
from qgalore.data.tokenizer import train_tokenizer
from qgalore.errors import ConfigError
from qgalore.files import export_int8
from qgalore.lowrank.layers.linear import LowRankLinear


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a little text to learn from"] * 10, vocab_size=300, report=lambda line: None)


def trained(model, tokens, group_size, **options):
    qgalore.convert(model, rank=4, group_size=group_size, **options)
    opt = qgalore.optimizer(model, lr=1e-2)
    for _ in range(3):
        model(tokens, use_cache=False).logits.float().logsumexp(-1).mean().backward()
        opt.step()
    return model.eval()


@pytest.mark.parametrize("width", [128, 64, 33, 101])
def test_packing_is_the_librarys(width):
    q = torch.randint(-127, 128, (5, width), dtype=torch.int8)
    assert torch.equal(export_int8.pack(q), pack_to_int32(q, 8))
    assert torch.equal(unpack_from_int32(export_int8.pack(q), 8, q.shape), q)


SHAPES = {
    "group 128": (128, {"hidden_size": 256, "intermediate_size": 256}),
    "group 64": (64, {"hidden_size": 256, "intermediate_size": 256}),
    "group 32": (32, {"hidden_size": 256, "intermediate_size": 256}),
    "row": ("row", {"hidden_size": 256, "intermediate_size": 256}),
    "mixed and odd": (128, {"hidden_size": 256, "intermediate_size": 101}),
    "tied": (64, {"hidden_size": 256, "intermediate_size": 256, "tie_word_embeddings": True}),
    "biases": (64, {"hidden_size": 256, "intermediate_size": 256, "attention_bias": True}),
}


@pytest.mark.parametrize("case", SHAPES)
def test_transformers_reads_back_every_bit(tiny_llama, tokenizer, tmp_path, case):
    """q, scales, dequantized weights and logits, through transformers and compressed-tensors."""
    group_size, shape = SHAPES[case]
    tokens = torch.randint(0, 300, (2, 10), generator=torch.Generator().manual_seed(0))
    # not .to(bfloat16), which would round the rotary frequencies too
    blank = AutoModelForCausalLM.from_config(tiny_llama(vocab_size=320, **shape).config, dtype=torch.bfloat16)
    model = trained(blank, tokens, group_size)
    lines = []
    export_int8.save(model, tokenizer, tmp_path, lines.append)
    assert lines == ["int8 export: not quantized, kept in bf16: lm_head"]

    stored = load_file(tmp_path / "model.safetensors")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LowRankLinear)}
    for name, layer in layers.items():
        assert torch.equal(unpack_from_int32(stored[f"{name}.weight_packed"], 8, layer.weight.shape), layer.weight)
        assert torch.equal(stored[f"{name}.weight_scale"], layer.weight_scale)
    assert ("lm_head.weight" in stored) == (case != "tied")

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="eager").eval()
    ours, theirs = model(tokens).logits, loaded(tokens).logits
    assert torch.equal(ours, theirs)
    for name, layer in layers.items():
        weight = loaded.get_submodule(name).weight
        assert torch.equal(weight, layer.dense_weight(torch.bfloat16)), name


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_int8_embeddings_are_dense_and_an_int8_head_is_quantized(tiny_llama, tokenizer, tmp_path, tied):
    tokens = torch.randint(0, 300, (2, 10), generator=torch.Generator().manual_seed(0))
    shape = {"hidden_size": 256, "intermediate_size": 256, "tie_word_embeddings": tied}
    blank = AutoModelForCausalLM.from_config(tiny_llama(vocab_size=320, **shape).config, dtype=torch.bfloat16)
    model = trained(blank, tokens, 64, embeddings="int8")
    lines = []
    export_int8.save(model, tokenizer, tmp_path, lines.append)
    dense = "model.embed_tokens" + (", lm_head" if tied else "")
    assert lines == [f"int8 export: not quantized, kept in bf16: {dense}"]
    quantization = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert quantization["ignore"] == (["lm_head"] if tied else [])
    targets = [target for group in quantization["config_groups"].values() for target in group["targets"]]
    # vLLM's head is no Linear: only a name reaches it
    assert any(re.match(t.removeprefix("re:"), "lm_head") for t in targets if t.startswith("re:")) == (not tied)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert ("lm_head.weight_packed" in stored) == (not tied)
    assert not any(name.startswith("model.embed_tokens.") for name in stored if not name.endswith(".weight"))

    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(loaded.get_input_embeddings().weight, model.model.embed_tokens.dense_weight(torch.bfloat16))
    assert torch.equal(model(tokens).logits, loaded.eval()(tokens).logits)


def test_layers_of_another_scheme_are_named(tiny_llama):
    model = tiny_llama(hidden_size=256, intermediate_size=101)
    qgalore.convert(model, rank=4, exclude=["*.1.mlp.up_proj"])
    config = json.loads(json.dumps(export_int8.quantization_config(model)))
    groups = config["config_groups"]
    assert groups["group_0"]["targets"] == [r"re:.*\.down_proj$"]  # names first: readers take the first that matches
    assert groups["group_0"]["weights"]["strategy"] == "channel"
    assert groups["group_1"]["targets"] == ["Linear"]
    assert groups["group_1"]["weights"]["group_size"] == 128
    assert config["ignore"] == ["model.layers.1.mlp.up_proj", "lm_head"]


def test_what_is_not_int8_is_refused(tiny_llama, tokenizer, tmp_path):
    for model in (tiny_llama(), tiny_llama()):
        qgalore.convert(model, rank=4, weight_format="none")
        with pytest.raises(ConfigError, match="not int8"):
            export_int8.save(model, tokenizer, tmp_path)
    conv = GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=32, n_layer=1, n_head=2, n_positions=32))
    qgalore.convert(conv, rank=4)
    with pytest.raises(ConfigError, match="Conv1D"):
        export_int8.save(conv, tokenizer, tmp_path)
