"""A mixture's experts as batches of matrices: transformers' own function, one basis each, idle ones left alone."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

import qgalore
from qgalore.lowrank.layers.experts import Experts
from qgalore.lowrank.layers.linear import LowRankLinear
from qgalore.models.convert import convert  # without a guard: gradients are read, nothing is stepped

SHAPE = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": None, "num_experts_per_tok": 2,
}  # fmt: skip
CONFIGS = {
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=4),
    "qwen3_moe": Qwen3MoeConfig(**SHAPE, moe_intermediate_size=24, num_experts=4, norm_topk_prob=True),
}
EVERY = pytest.mark.parametrize("name", CONFIGS)


def mixture(name, dtype=torch.float32):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), dtype=dtype)
    model.set_experts_implementation("eager")
    return model


def loss_of(model, tokens):
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def expert_layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, LowRankLinear) and ".experts." in n}


def send_all_to(model, *experts):
    """Let the first layer's router choose ``experts`` for every token, with equal shares."""

    def choose(module, inputs, output):
        rows = len(output[1])
        index = torch.tensor(experts).expand(rows, -1)
        return output[0], output[1] * 0 + 0.5, index

    return model.model.layers[0].mlp.gate.register_forward_hook(choose)


@EVERY
def test_experts_compute_and_differentiate_as_transformers_own(name, token_batches):
    """Unquantized, at full rank: Δ's gradient of expert e is slice e of the stacked tensor's. Rows are summed in
    another order: a few roundings of 2⁻²⁴ relative to the largest terms."""
    model = mixture(name)
    twin = copy.deepcopy(model)
    convert(twin, rank=None, weight_format="none")
    tokens = token_batches()[0]
    one, other = loss_of(model, tokens), loss_of(twin, tokens)
    assert float((one - other).detach().abs()) < 1e-6
    one.backward()
    other.backward()
    found = expert_layers(twin)
    assert len(found) == 2 * 2 * 4
    for path, layer in found.items():
        place, _, number = path.rpartition(".")
        wanted = model.get_parameter(place).grad[int(number)]
        if layer.delta.grad is None:
            assert not wanted.any()  # no token came
        else:
            assert float((layer.delta.grad - wanted).norm() / wanted.norm()) < 1e-5


@EVERY
def test_bf16_is_as_exact_as_transformers_own(name):
    """Three products, a gate and a sum, each rounded to bf16 (2⁻⁹ of its value), on both sides."""
    block = mixture(name, torch.bfloat16).model.layers[0].mlp
    hidden = torch.randn(1, 24, 32, generator=torch.Generator().manual_seed(0))
    exact = copy.deepcopy(block).float()(hidden.to(torch.bfloat16).float()).detach()
    qgalore.convert(block, rank=None, weight_format="none")
    assert isinstance(block.experts, Experts)
    found = block(hidden.to(torch.bfloat16)).float().detach()
    assert float((found - exact).norm() / exact.norm()) < 5 * 2.0**-9


@EVERY
def test_fused_and_deferred_are_the_same_bits_and_every_expert_moves(name, token_batches):
    results = []
    for stepping in ("fused", "deferred"):
        model = mixture(name)
        qgalore.convert(model, rank=4)
        before = {n: m.dense_weight() for n, m in expert_layers(model).items()}
        opt = qgalore.optimizer(model, lr=0.01, scale=1.0, update_proj_gap=3, stepping=stepping, seed=5)
        for tokens in token_batches(steps=8, rows=8):
            loss_of(model, tokens).backward()
            opt.step()
        for path, layer in expert_layers(model).items():
            assert not torch.equal(layer.dense_weight(), before[path]), path
        results.append(({n: v.clone() for n, v in model.state_dict().items()}, opt.refresh_counts()))
    assert results[0][1] == results[1][1]
    for path, value in results[0][0].items():
        assert torch.equal(value, results[1][0][path]), path


@pytest.mark.parametrize("stepping", ["fused", "deferred"])
def test_an_expert_without_tokens_waits_and_nothing_decays_it(stepping, token_batches):
    """Experts 2 and 3 of the first layer get no token for three steps: no error, no bit of theirs changes (decay would
    shrink them: 0.1 a step), their refresh is due all the while and counted, and comes with the first tokens."""
    model = mixture("mixtral")
    qgalore.convert(model, rank=4, weight_format="none")
    opt = qgalore.optimizer(model, lr=0.1, scale=1.0, weight_decay=1.0, stepping=stepping)
    idle = [f"model.layers.0.mlp.experts.{kind}.{e}" for kind in ("gate_up_proj", "down_proj") for e in (2, 3)]
    before = {n: m.dense_weight().clone() for n, m in expert_layers(model).items()}
    hook = send_all_to(model, 0, 1)
    for tokens in token_batches(steps=3, rows=8):
        loss_of(model, tokens).backward()
        opt.step()
        assert [n for n in opt.untouched if "layers.0" in n] == idle
        assert opt.waiting() == len(opt.untouched)
    layers = expert_layers(model)
    for path, value in before.items():
        if "layers.0" in path:
            assert torch.equal(layers[path].dense_weight(), value) == (path in idle), path
    hook.remove()
    send_all_to(model, 2, 3)
    opt.events.clear()
    loss_of(model, token_batches()[0]).backward()
    opt.step()
    waited = {row["layer"]: row["waited"] for row in opt.events if row["layer"] in idle}
    assert waited == dict.fromkeys(idle, 3)
    assert all(not torch.equal(layers[path].dense_weight(), before[path]) for path in idle)


def test_a_mixture_follows_adamw_that_leaves_idle_experts_alone(token_batches):
    """Invariant 1 for experts: at full rank, unquantized, the steps are torch.optim.AdamW's with each expert's matrix a
    parameter of its own. 1e-4 of the way travelled as for dense layers."""
    model = mixture("mixtral")
    start = copy.deepcopy(model)
    twin = copy.deepcopy(model)
    parts = {n: [torch.nn.Parameter(p) for p in v.detach()] for n, v in twin.named_parameters() if v.ndim == 3}
    plain = [p for p in twin.parameters() if p.ndim < 3]
    matrices = [*(p for p in plain if p.ndim == 2), *(p for each in parts.values() for p in each)]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": [p for p in plain if p.ndim < 2]}]
    reference = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.0)
    qgalore.convert(model, rank=None, weight_format="none")
    opt = qgalore.optimizer(model, lr=1e-3, inner="adamw", scale=1.0, weight_decay=0.1)
    for step, tokens in enumerate(token_batches(steps=8)):
        hooks = [send_all_to(m, *((0, 1) if step % 2 else (1, 3))) for m in (model, twin)]
        loss_of(model, tokens).backward()
        opt.step()
        loss_of(twin, tokens).backward()
        for path, each in parts.items():
            stacked = twin.get_parameter(path)
            for part, gradient in zip(each, stacked.grad, strict=True):
                part.grad = gradient.clone() if gradient.any() else None
            stacked.grad = None
        reference.step()
        reference.zero_grad()
        for hook in hooks:
            hook.remove()
    gap = way = 0.0
    for path, layer in expert_layers(model).items():
        place, _, number = path.rpartition(".")
        wanted, first = (m.get_parameter(place)[int(number)].detach().double() for m in (twin, start))
        gap += float((layer.dense_weight().double() - wanted).square().sum())
        way += float((wanted - first).square().sum())
    assert way > 0
    assert (gap / way) ** 0.5 < 1e-4
