"""What int8 costs a trained model's logits: the error of rounding each weight, and nothing beside it."""

import copy
import statistics

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from qgalore.lowrank.layers.linear import LowRankLinear
from qgalore.models import loading, streaming
from qgalore.models.convert import convert
from qgalore.quant.int8 import dequantize

SMALL = {"vocab_size": 97, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
WIDE = {**SMALL, "hidden_size": 128, "intermediate_size": 192}
TIED = {**SMALL, "hidden_size": 64, "intermediate_size": 172, "tie_word_embeddings": True}  # stories260K's widths
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**WIDE), {}),
    "llama, groups of 32": (LlamaForCausalLM, LlamaConfig(**WIDE), {"group_size": 32}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**WIDE), {"group_size": "row"}),
    "tied": (LlamaForCausalLM, LlamaConfig(**TIED), {}),
    "tied, int8 embeddings": (LlamaForCausalLM, LlamaConfig(**TIED), {"embeddings": "int8"}),
}
DRAWS = 15


def rows(count: int, seed: int) -> Tensor:
    """Arithmetic sequences modulo the vocabulary (count, 24)."""
    start, stride = torch.randint(1, 97, (2, count, 1), generator=torch.Generator().manual_seed(seed))
    return (start + stride % 9 * torch.arange(24)) % 97


def trained(family: type, config) -> nn.Module:
    """A model that has learnt something, in which one input channel in 16 of a block's matrices is eight times as
    large, and the norm before it as much smaller: large models have such channels, and rounding suffers from them."""
    torch.manual_seed(3)
    model = family(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(40):
        batch = rows(8, step)
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        for block in model.model.layers:
            attention, mlp = block.self_attn, block.mlp
            for norm, readers in (
                (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                norm.weight[::16] /= 8
                for reader in readers:
                    reader.weight[:, ::16] *= 8
    return model.eval()


def loaded(folder, **options) -> nn.Module:
    """The model in ``folder`` as a run has it: converted on the meta device, then read a few rows at a time."""
    model = loading.pretrained_skeleton(folder, dtype=torch.float32)
    source = loading.stored_source(folder, model, report=pytest.fail)
    convert(model, rank=4, **options)
    streaming.allocate(model, torch.device("cpu"))
    streaming.fill(model, source, "model")
    return model.eval()


def steps(converted: nn.Module) -> dict[str, Tensor]:
    """The grid's step at each weight, by the original's names."""
    layers = [(name, m) for name, m in converted.named_modules() if isinstance(m, LowRankLinear)]
    return {f"{name}.weight": dequantize(torch.ones_like(m.weight), m.weight_scale) for name, m in layers}


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_logits_differ_as_by_noise_of_half_a_step(name, tmp_path):
    """Rounding to the nearest leaves each weight an error within half a step, and as good as uniform there. So the
    logits' error is one more draw of what independent uniform noise on the original's weights does to them, whose norm
    varies by 10 to 15 % from draw to draw: half above or below the median is three standard deviations away. (Cutting
    off instead of rounding gave 1.8 to 2.9 times the median.)
    """
    family, config, options = MODELS[name]
    with torch.enable_grad():
        original = trained(family, config)
    original.save_pretrained(tmp_path)
    converted = loaded(tmp_path, **options)
    batch = rows(16, 999)
    wanted = original(batch).logits
    assert torch.nn.functional.cross_entropy(wanted[:, :-1].flatten(0, 1), batch[:, 1:].flatten()) < 3.5  # ln 97 = 4.6
    error = float((converted(batch).logits - wanted).norm())
    noise = []
    for seed in range(DRAWS):
        generator = torch.Generator().manual_seed(seed)
        twin = copy.deepcopy(original)
        weights = dict(twin.named_parameters())
        for place, step in steps(converted).items():
            weights[place] += (torch.rand(step.shape, generator=generator) - 0.5) * step
        noise.append(float((twin(batch).logits - wanted).norm()))
    ratio = error / statistics.median(noise)
    print(f"{name}: {ratio:.2f} of the noise's median, draws from {min(noise):.3f} to {max(noise):.3f}")
    assert 1 / 1.5 < ratio < 1.5
