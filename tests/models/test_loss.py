import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from qgalore.lowrank.layers import head as chunked
from qgalore.models import convert as conversion
from qgalore.models.loss import balance, choose_loss, chunked_loss, head_is_plain, summed_loss, target_tokens
from qgalore.models.recompute import checkpoint_blocks
from qgalore.training.model import balance_line

SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 97, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
PLAIN = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "llama tied": lambda: LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**SHAPE),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "gemma2 without capping": lambda: Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=None),
    "gpt2": lambda: GPT2Config(
        vocab_size=97, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
    "opt": lambda: OPTConfig(**SHAPE, ffn_dim=48, word_embed_proj_dim=16),
    "gpt_neox": lambda: GPTNeoXConfig(**SHAPE),
    "mixtral": lambda: MixtralConfig(**SHAPE, num_local_experts=4),
    "phi": lambda: PhiConfig(**SHAPE),
}
CHANGED = {
    "gemma2": lambda: Gemma2Config(**SHAPE, head_dim=8),
    "cohere": lambda: CohereConfig(**SHAPE),
    "granite": lambda: GraniteConfig(**SHAPE, logits_scaling=2.0),
}


def build(config, dtype=torch.float32):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def batch_for(rows=2, length=12):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 97, (rows, length + 1), generator=generator)
    labels = ids[:, 1:].clone()
    labels[0, :3] = -100
    positions = torch.cat((torch.arange(length // 2), torch.arange(length - length // 2))).repeat(rows, 1)
    return {"input_ids": ids[:, :-1], "labels": labels, "position_ids": positions}


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("converted", ["converted", ""])
def test_chunked_and_whole_logits_agree(name, converted, monkeypatch):
    model = build(PLAIN[name]()).eval()
    if converted:
        conversion.convert(model, rank=4)
    assert choose_loss(model) is chunked_loss
    assert not model.training
    monkeypatch.setattr(chunked, "BLOCK_ELEMENTS", 24 * 20)
    batch = batch_for()
    found = []
    for loss_of in (summed_loss, chunked_loss):
        model.zero_grad(set_to_none=True)
        loss = loss_of(model, batch)
        loss.backward()
        found.append((loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (whole, wanted), (blocks, got) = found
    torch.testing.assert_close(blocks, whole, rtol=1e-6, atol=0.0)
    assert got.keys() == wanted.keys()
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    for parameter, gradient in wanted.items():
        # fp32 rounding through two layers; a key's bias has a gradient of zero, which is all rounding
        error = float((got[parameter] - gradient).abs().max())
        assert error <= 1e-5 * float(gradient.abs().max()) + 1e-8 * largest, parameter


@pytest.mark.parametrize("name", CHANGED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_changes_its_logits_keeps_the_whole_path(name, dtype):
    """Gemma 2's cap at initialisation is below bf16's resolution of the loss: it must be seen all the same."""
    model = build(CHANGED[name](), dtype).train()
    assert not head_is_plain(model)
    assert model.training
    assert choose_loss(model) is summed_loss


@pytest.mark.parametrize("name", [*PLAIN, *CHANGED])
def test_the_meta_device_gives_the_same_answer(name):
    """What a plan made before anything is allocated needs to know."""
    config = (PLAIN | CHANGED)[name]()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.tie_weights()
    assert model.get_input_embeddings().weight.is_meta
    assert head_is_plain(model) == (name in PLAIN)


def test_a_head_scaled_in_place_is_seen_on_the_meta_device(tiny_llama):
    for device in ("cpu", "meta"):
        model = tiny_llama().to(device)
        assert head_is_plain(model)
        forward = model.forward

        def scaled(*args, forward=forward, **kwargs):
            output = forward(*args, **kwargs)
            output.logits.mul_(2.0)
            return output

        model.forward = scaled
        assert not head_is_plain(model), device


def test_bf16_models_are_approved():
    for name in ("llama", "gpt2", "phi"):
        assert head_is_plain(build(PLAIN[name](), torch.bfloat16)), name


def test_a_small_change_of_what_enters_the_head_is_seen(tiny_llama):
    model = tiny_llama()
    model.lm_head.register_forward_pre_hook(lambda _, inputs: (1.0001 * inputs[0],))
    assert choose_loss(model) is summed_loss


def test_a_head_of_another_kind_keeps_the_whole_path(tiny_llama):
    class Doubling(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = tiny_llama()
    model.lm_head = Doubling(64, 96, bias=False)
    assert choose_loss(model) is summed_loss


ROUTED = {
    "mixtral": lambda: MixtralConfig(**SHAPE, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.1),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SHAPE, num_experts=4, num_experts_per_tok=2, output_router_logits=True, router_aux_loss_coef=0.1
    ),
}


def test_the_load_balancing_loss_is_transformers_own():
    logits = tuple(torch.randn(50, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    torch.testing.assert_close(balance(logits, 2), load_balancing_loss_func(logits, 8, 2))
    even = tuple(1e-4 * layer for layer in logits)  # probabilities of 1/8: 8 · Σ f/8 = Σ f = the number chosen
    assert float(balance(even, 2)) == pytest.approx(2.0, rel=1e-3)


@pytest.mark.parametrize("name", ROUTED)
@pytest.mark.parametrize("loss_of", [summed_loss, chunked_loss])
def test_a_mixture_is_balanced_in_training_where_its_configuration_asks(name, loss_of):
    """The value is transformers' own loss, a mean, times the targets; gradients reach the routers, the same with
    checkpointed blocks; evaluation is cross entropy alone, and so is training that does not ask."""
    model, batch = build(ROUTED[name]()), batch_for()
    batch["labels"][0, :3] = batch["input_ids"][0, 1:4]
    plain = build(ROUTED[name]())
    plain.config.output_router_logits = False
    assert "router_aux_loss_coef 0.1) is not used" in balance_line(plain)
    assert "cross entropy + 0.1 ·" in balance_line(model)
    entropy = float(loss_of(plain, batch).detach())
    assert float(loss_of(model.eval(), batch).detach()) == entropy
    loss = loss_of(model.train(), batch)
    shifted = {"labels": None, "shift_labels": batch["labels"]}
    theirs = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False, **shifted)
    wanted = entropy + 0.1 * target_tokens(batch) * float(theirs.aux_loss.detach())
    assert float(loss.detach()) == pytest.approx(wanted, rel=1e-6)
    assert wanted > entropy * 1.01
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    checkpoint_blocks(model, "device")
    model.zero_grad()
    loss_of(model, batch).backward()
    assert all(torch.equal(p.grad, gradients[n]) for n, p in model.named_parameters())
    loss_of(plain, batch).backward()
    assert not torch.allclose(plain.model.layers[0].mlp.gate.weight.grad, gradients["model.layers.0.mlp.gate.weight"])
