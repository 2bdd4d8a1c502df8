"""Decoders and encoders by name: what converts, what stays, and that everything trains."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3MoeConfig,
    RobertaConfig,
)

import qgalore
from qgalore.errors import ConfigError
from qgalore.lowrank.layers.linear import LowRankLinear

SIZE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0}
PLAIN = {**SIZE, "intermediate_size": 48, "max_position_embeddings": 64}
GROUPED = {**PLAIN, "num_key_value_heads": 1}
OPT = {**SIZE, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "pad_token_id": 0}
# name: (config, converted layers of the body, its classifier's layers)
DECODERS = {
    "llama": (LlamaConfig(**GROUPED), 14, ["score"]),
    "mistral": (MistralConfig(**GROUPED), 14, ["score"]),
    "qwen2": (Qwen2Config(**GROUPED), 14, ["score"]),
    "gemma": (GemmaConfig(**GROUPED, head_dim=16), 14, ["score"]),
    "phi": (PhiConfig(**PLAIN), 12, ["score"]),
    "gpt_neox": (GPTNeoXConfig(**PLAIN), 8, ["score"]),
    "opt": (OPTConfig(**OPT), 12, ["score"]),
    "gpt2": (GPT2Config(**GPT2), 8, ["score"]),
}
ENCODERS = {
    "bert": (BertConfig(**PLAIN), 13, ["classifier"]),  # the pooler belongs to the body
    "roberta": (RobertaConfig(**PLAIN), 12, ["classifier.dense", "classifier.out_proj"]),
}


def made(factory, config, training=True):
    torch.manual_seed(0)
    return factory.from_config(config, dtype=torch.float32).train(training)


def inputs(rows=4):
    tokens = torch.randint(2, 64, (rows, 12), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(tokens)
    mask[1, 7:] = 0
    return {"input_ids": tokens.where(mask.bool(), 0), "attention_mask": mask}


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_classifiers_convert_but_for_their_heads_and_train_everywhere(name):
    """Dropout is on where the architecture has it. A key's bias gets no gradient beyond rounding from softmax, and a
    padded, unattended token none at all; every other tensor must move."""
    config, expected, head = {**DECODERS, **ENCODERS}[name]
    model = made(AutoModelForSequenceClassification, config)
    report = qgalore.convert(model, rank=4)
    assert len(report.converted) == expected
    assert list(report.skipped) == head
    assert all("head" in why for why in report.skipped.values())
    optimizer = qgalore.optimizer(model, lr=1e-2, scale=1.0)
    trained = {n: p.clone() for n, p in model.named_parameters() if p.dtype == torch.int8 or n in report.dense}
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, LowRankLinear))
    assert weights + sum(report.dense.values()) == sum(p.numel() for p in trained.values())
    model(**inputs()).logits.square().mean().backward()
    optimizer.step()
    assert optimizer.untouched == []
    same = [n for n, p in model.named_parameters() if n in trained and torch.equal(p, trained[n])]
    assert [n for n in same if not n.endswith(("k_proj.bias", "key.bias"))] == []


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_a_converted_classifier_computes_nearly_the_same(name):
    """An int8 weight is off by at most half of 1.1 · absmax / 127, 0.4 % · 3 of a Gaussian one; layers add up."""
    config = {**DECODERS, **ENCODERS}[name][0]
    model = made(AutoModelForSequenceClassification, config, training=False)
    with torch.no_grad():
        before = model(**inputs()).logits
        qgalore.convert(model, rank=4)
        after = model(**inputs()).logits
    assert 0 < float((after - before).norm() / before.norm()) < 0.05


def test_dropout_is_as_before_and_off_in_evaluation():
    """The same generator state drops the same activations before and after conversion."""
    model = made(AutoModelForSequenceClassification, BertConfig(**PLAIN, hidden_dropout_prob=0.5))
    torch.manual_seed(1)
    before = model(**inputs()).logits.detach()
    qgalore.convert(model, rank=4)
    torch.manual_seed(1)
    again, other = model(**inputs()).logits.detach(), model(**inputs()).logits.detach()
    assert float((again - before).norm() / before.norm()) < 0.05
    assert float((other - again).norm() / again.norm()) > 0.05
    model.eval()
    assert torch.equal(model(**inputs()).logits, model(**inputs()).logits)


def test_an_included_head_converts():
    model = made(AutoModelForSequenceClassification, BertConfig(**PLAIN))
    report = qgalore.convert(model, rank=2, include=["classifier", "*.attention.*"])
    assert "classifier" in {layer.name for layer in report.converted}
    assert report.skipped["bert.pooler.dense"] == "not in include"


MIXTURES = [
    MixtralConfig(**GROUPED, num_local_experts=4),
    Qwen3MoeConfig(**GROUPED, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2),
]


@pytest.mark.parametrize("config", MIXTURES, ids=lambda config: config.model_type)
def test_experts_convert_each_by_itself_or_stay_where_asked(config):
    """2 layers of 4 attention matrices and 2 · 4 of the experts; the routers train in full."""
    model = made(AutoModelForCausalLM, config)
    report = qgalore.convert(model, rank=4)
    assert len(report.converted) == 2 * (4 + 2 * 4)
    assert {name.split(".")[-1] for name in report.dense} <= {"weight"}
    assert "model.layers.1.mlp.gate.weight" in report.dense
    assert " gate_up_proj " in str(report)
    left = made(AutoModelForCausalLM, config)
    report = qgalore.convert(left, rank=4, exclude=["*.experts"])
    assert len(report.converted) == 8
    assert report.skipped["model.layers.0.mlp.experts"] == "in exclude"
    assert "model.layers.0.mlp.experts.down_proj" in report.dense
    frozen = made(AutoModelForCausalLM, config)
    for parameter in frozen.parameters():
        parameter.requires_grad_(parameter.ndim < 3)
    assert len(qgalore.convert(frozen, rank=4).converted) == 8


def test_experts_of_another_kind_or_frozen_in_part_are_refused():
    config = GptOssConfig(**GROUPED, num_local_experts=4, head_dim=16)
    model = made(AutoModelForCausalLM, config)
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.experts keeps .* of more than two dimensions"):
        qgalore.convert(model, rank=4)
    assert {name: type(module) for name, module in model.named_modules()} == before
    model = made(AutoModelForCausalLM, MIXTURES[0])
    model.model.layers[1].mlp.experts.down_proj.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.experts keeps .* a part of its experts is frozen"):
        qgalore.convert(model, rank=4)
