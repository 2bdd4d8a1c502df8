import copy

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, TokenType
from gguf.quants import dequantize
from transformers import GPT2Config, GPT2LMHeadModel

import qgalore
from qgalore.data.chat import answer_ends
from qgalore.data.tokenizer import train_tokenizer
from qgalore.errors import ConfigError
from qgalore.files import export_gguf
from qgalore.lowrank.layers.linear import LowRankLinear


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a little text to learn from"] * 10, vocab_size=300, report=lambda line: None)


def read(folder):
    reader = GGUFReader(folder / "model.gguf")
    return reader, {tensor.name: tensor for tensor in reader.tensors}


@pytest.mark.parametrize("group_size", [128, 64, 32, "row"])
def test_the_integers_and_scales_survive(tiny_llama, tokenizer, tmp_path, group_size):
    model = tiny_llama(vocab_size=320, hidden_size=256, intermediate_size=384)
    qgalore.convert(model, rank=4, group_size=group_size)
    export_gguf.save(model, tokenizer, tmp_path)
    _, tensors = read(tmp_path)
    layer = model.model.layers[1].mlp.down_proj
    stored = tensors["blk.1.ffn_down.weight"]
    assert stored.tensor_type == GGMLQuantizationType.Q8_0
    blocks = np.asarray(stored.data).reshape(256, 384 // 32, 34)
    q = torch.from_numpy(blocks[:, :, 2:].copy()).view(torch.int8).reshape(256, 384)
    assert torch.equal(q, layer.weight)
    scales = torch.from_numpy(blocks[:, :, :2].copy()).view(torch.float16).float().reshape(256, -1)
    assert torch.equal(scales, layer.weight_scale.float().repeat_interleave(12 // layer.weight_scale.shape[1], dim=1))
    assert torch.equal(torch.from_numpy(dequantize(stored.data, stored.tensor_type)), layer.dense_weight())
    query = model.model.layers[0].self_attn.q_proj.dense_weight()[export_gguf.rope_order(4, 256)]
    stored = tensors["blk.0.attn_q.weight"]
    assert torch.equal(torch.from_numpy(dequantize(stored.data, stored.tensor_type)), query)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_int8_embeddings_and_head_are_the_same_integers(tiny_llama, tokenizer, tmp_path, tied):
    model = tiny_llama(vocab_size=320, hidden_size=256, intermediate_size=384, tie_word_embeddings=tied)
    qgalore.convert(model, rank=4, embeddings="int8")
    export_gguf.save(model, tokenizer, tmp_path)
    _, tensors = read(tmp_path)
    layers = {"token_embd.weight": model.model.embed_tokens}
    if not tied:
        layers["output.weight"] = model.lm_head
    assert ("output.weight" in tensors) == (not tied)  # tied: llama.cpp takes the embedding
    for name, layer in layers.items():
        assert tensors[name].tensor_type == GGMLQuantizationType.Q8_0
        blocks = np.asarray(tensors[name].data).reshape(320, 256 // 32, 34)
        q = torch.from_numpy(blocks[:, :, 2:].copy()).view(torch.int8).reshape(320, 256)
        assert torch.equal(q, layer.weight)
        values = torch.from_numpy(dequantize(tensors[name].data, tensors[name].tensor_type))
        assert torch.equal(values, layer.dense_weight())


def test_everything_is_there(tiny_llama, tokenizer, tmp_path):
    model = tiny_llama(vocab_size=320, hidden_size=64, intermediate_size=101)
    qgalore.convert(model, rank=4)
    lines = []
    export_gguf.save(model, tokenizer, tmp_path, lines.append)
    reader, tensors = read(tmp_path)
    assert len(tensors) == len([m for m in model.modules() if isinstance(m, LowRankLinear)]) + 7
    assert len(lines) == 2
    assert "in_features 101 is no multiple of 32: bf16" in lines[0]
    assert tensors["blk.0.ffn_down.weight"].tensor_type == GGMLQuantizationType.BF16
    assert tensors["output_norm.weight"].tensor_type == GGMLQuantizationType.F32
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["llama.attention.head_count_kv"] == 2
    assert fields["llama.rope.freq_base"] == 10000.0
    known = len(tokenizer)
    assert fields["tokenizer.ggml.tokens"][:known] == tokenizer.convert_ids_to_tokens(range(known))
    assert fields["tokenizer.ggml.tokens"][known] == f"[PAD{known}]"
    assert len(fields["tokenizer.ggml.tokens"]) == 320
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id


def test_rope_order_turns_half_rotations_into_adjacent_ones():
    order = export_gguf.rope_order(heads=2, rows=8)
    assert order.tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_what_it_does_not_know_is_refused(tokenizer, tmp_path):
    conv = GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=32, n_layer=1, n_head=2, n_positions=32))
    with pytest.raises(ConfigError, match="not gpt2"):
        export_gguf.save(conv, tokenizer, tmp_path)


def test_the_file_names_every_token_that_ends_an_answer(tiny_llama, tokenizer, tmp_path):
    """eos is the tokenizer's, eot what the model was trained to end answers with; the template goes along."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert answer_ends(tokenizer) == [end]
    model = tiny_llama(vocab_size=320)
    qgalore.convert(model, rank=4)
    model.generation_config.eos_token_id = [end, tokenizer.eos_token_id]
    export_gguf.save(model, tokenizer, tmp_path)
    fields = {name: field.contents() for name, field in read(tmp_path)[0].fields.items()}
    assert fields["tokenizer.ggml.eot_token_id"] == end
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template
    assert fields["tokenizer.ggml.token_type"][end] == TokenType.CONTROL
    assert "tokenizer.ggml.eom_token_id" not in fields
