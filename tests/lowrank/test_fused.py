"""Weights that hold several matrices, which Muon orthogonalises one by one: where these lie, and what a step does."""

import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from qgalore.lowrank.factory import optimizer
from qgalore.lowrank.layers.linear import LowRankLinear
from qgalore.lowrank.rules import RuleOptions, fused
from qgalore.lowrank.rules.muon import Muon
from qgalore.lowrank.rules.orthogonal import orthogonalize
from qgalore.models.convert import convert

SHAPE = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "pad_token_id": None}
TOKENS = torch.arange(12).reshape(2, 6)


def causal(kind, **changes):
    torch.manual_seed(0)
    fields = {name: value for name, value in SHAPE.items() if kind != "phi3" or name != "head_dim"}
    config = AutoConfig.for_model(kind, **fields | changes)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_head=4, n_layer=1, n_positions=16, vocab_size=64, attn_implementation="eager")
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("kind", ["phi3", "glm", "glm4"])
def test_gate_and_up_are_the_halves_that_the_model_multiplies(kind):
    model = causal(kind)
    mlp, x = model.model.layers[0].mlp, torch.randn(5, 32)
    parts = fused.rows_of_parts("model.layers.0.mlp.gate_up_proj", 48, model.config)
    gate, up = mlp.gate_up_proj.weight.split(list(parts))
    expected = mlp.down_proj(torch.nn.functional.silu(x @ gate.T) * (x @ up.T))
    assert torch.allclose(mlp(x), expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe"])
def test_an_experts_gate_and_up_are_halves_too(kind):
    counts = {"num_experts": 2, "num_local_experts": 2, "moe_intermediate_size": 24, "num_experts_per_tok": 1}
    model = causal(kind, **counts)
    experts, x = next(m for n, m in model.named_modules() if n.endswith(".experts")), torch.randn(5, 32)
    rows = experts.gate_up_proj.shape[1]
    parts = fused.rows_of_parts("model.layers.0.mlp.experts.gate_up_proj.1", rows, model.config)
    gate, up = experts.gate_up_proj[1].split(list(parts))
    ones = torch.ones(5, 1)
    expected = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ experts.down_proj[1].T
    assert torch.allclose(experts(x, ones.long(), ones), expected, atol=1e-6)


@pytest.mark.parametrize(("make", "leaf"), [(lambda: causal("phi3"), "self_attn.qkv_proj"), (gpt2, "attn.c_attn")])
def test_values_are_the_last_part_and_queries_the_first(make, leaf):
    """Who attends to whom does not depend on values. Its first token is alone, whatever query and key are."""
    model = make()
    name, module = next((n, m) for n, m in model.named_modules() if n.endswith(leaf))
    weight = module.weight.detach()
    rows = weight if isinstance(module, torch.nn.Linear) else weight.T
    parts = fused.rows_of_parts(name, len(rows), model.config)
    assert len(parts) == 3

    def seen(part):
        kept = rows.clone()
        rows.split(list(parts))[part].mul_(-1.0)
        out = model(TOKENS, output_attentions=True)
        rows.copy_(kept)
        return out.attentions[0], out.logits[:, 0]

    with torch.no_grad():
        attended, first = model(TOKENS, output_attentions=True).attentions[0], model(TOKENS).logits[:, 0]
        for part, same in ((0, False), (1, False), (2, True)):
            now, first_now = seen(part)
            assert torch.allclose(now, attended, atol=1e-7) == same
            assert torch.allclose(first_now, first, atol=1e-7) != same


def test_what_is_not_listed_stays_whole():
    config = AutoConfig.for_model("gpt2", n_embd=32)
    assert fused.rows_of_parts("transformer.h.0.crossattention.c_attn", 64, config) == (32, 32)
    assert fused.rows_of_parts("transformer.h.0.mlp.c_fc", 128, config) == (128,)
    assert fused.rows_of_parts("h.0.qkv_proj", 96, AutoConfig.for_model("codegen", n_embd=32)) == (96,)
    assert fused.rows_of_parts("h.0.qkv_proj", 96, None) == (96,)
    assert fused.rows_of_parts("h.0.qkv_proj", 97, causal("phi3").config) == (97,)


def test_a_step_orthogonalises_each_matrix_by_itself():
    model = causal("phi3")
    model(TOKENS, labels=TOKENS).loss.backward()
    names = ("qkv_proj", "gate_up_proj", "o_proj")
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if n.split(".")[-2] in names}
    model.zero_grad()
    convert(model, rank=None, weight_format="none")
    opt = optimizer(model, lr=0.5, rule="muon", stepping="fused", momentum="fp32", mu=0.8, scale=0.25)
    before = {tensor.name: tensor.stored.clone() for tensor in opt.tensors if tensor.keeps_whole}
    model(TOKENS, labels=TOKENS).loss.backward()
    opt.step()
    after = {tensor.name: tensor.stored for tensor in opt.tensors if tensor.keeps_whole}
    parts = {"qkv_proj": (32, 16, 16), "gate_up_proj": (24, 24), "o_proj": (32,)}
    assert len(gradients) == 3
    for name, gradient in gradients.items():
        layer = name.removesuffix(".weight")
        each = [orthogonalize(g) * 0.2 * math.sqrt(32) for g in gradient.split(parts[layer.split(".")[-1]])]
        moved = before[layer] - after[layer]
        assert float((moved - 0.125 * torch.cat(each)).norm() / moved.norm()) < 1e-3, layer


def test_matrices_of_two_layers_at_once_are_those_of_each():
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(2, 16, 12, generator=generator)

    def rules():
        made = [LowRankLinear(torch.zeros(16, 12), None, rank=None) for _ in range(2)]
        for module in made:
            module.row_parts = (8, 4, 4)
        return [Muon(module, i, RuleOptions(momentum="fp32")) for i, module in enumerate(made)]

    together = [rows(0, 16) for rows in Muon.directions(rules(), list(gradients.clone()), 1)]
    alone = [Muon.directions([rule], [g.clone()], 1)[0](0, 16) for rule, g in zip(rules(), gradients, strict=True)]
    assert torch.allclose(torch.stack(together), torch.stack(alone), atol=1e-5)
