"""The share of orthogonalisation in a step's arithmetic, against counts by hand."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, Phi3Config, Phi3ForCausalLM

from qgalore.lowrank.layers.experts import Experts
from qgalore.lowrank.rules.orthogonal import flop, orthogonalize
from qgalore.memory.orthogonal_work import Matrix, count, line, matrices
from qgalore.models.convert import convert


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (16, 16)])
def test_operations_are_those_that_pytorch_counts(shape):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        orthogonalize(torch.randn(shape))
    assert flop(*shape) == counter.get_total_flops()


def test_a_square_matrix_costs_five_widths_over_tokens():
    """The rule of thumb 5 m / T of the forward and backward work."""
    work = count([Matrix(512, 512)], recomputed=False)
    share = work.share(10_000)
    assert share / (1 - share) == pytest.approx(5 * 512 / 10_000)
    assert count([Matrix(512, 512)], recomputed=True).share(10_000) < share


def test_the_tokens_named_have_the_share_named():
    work = count([Matrix(512, 512), Matrix(512, 2048), Matrix(1000, 512, parts=())], recomputed=False)
    assert work.share(work.tokens_for(0.1)) == pytest.approx(0.1)
    assert work.share(2 * work.tokens_for(0.1)) < 0.1
    assert f"{work.tokens_for(0.1):,.0f} tokens" in line(work, 4096)
    assert f"{work.share(4096):.1%}" in line(work, 4096)


def test_an_expert_multiplies_its_share_of_the_tokens():
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(**shape, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, vocab_size=128)
    with torch.device("meta"):
        model = MixtralForCausalLM(config)
    convert(model, rank=None)
    assert any(isinstance(module, Experts) for module in model.modules())
    found = matrices(model, chosen=2)
    attention, experts = 4 * 64 * 64, 4 * 3 * 64 * 96
    head, router = 128 * 64, 4 * 64
    assert sum(m.rows * m.columns for m in found if m.parts) == attention + experts
    per_token = count(found, recomputed=False).per_token / 6
    assert per_token == pytest.approx(attention + experts / 2 + head, abs=router)  # the router is no nn.Linear


def test_fused_weights_cost_what_their_matrices_cost():
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "vocab_size": 128, "pad_token_id": None}
    fixed = []
    for model_class, config in ((LlamaForCausalLM, LlamaConfig(**shape)), (Phi3ForCausalLM, Phi3Config(**shape))):
        with torch.device("meta"):
            model = model_class(config)
        convert(model, rank=None)
        fixed.append(count(matrices(model), recomputed=False).fixed)
    assert fixed[0] == fixed[1] > 0
