"""What PyTorch's FSDP2 sends for a converted model, against bf16: the ground under ``parallel: shard``
(docs/scaling.md). Weights go round as int8; of the gradients only Δ's, by rows."""

import types

import pytest
import torch
from jobs import Wire
from processes import run_in
from torch import distributed, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from transformers import LlamaConfig, LlamaForCausalLM

from qgalore.lowrank.layers.linear import LowRankLinear
from qgalore.models.convert import convert
from qgalore.models.loss import chunked_loss
from qgalore.parallel import job

RANK, WIDTH, TOKENS = 8, 64, 16
SHAPE = {"hidden_size": WIDTH, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 96}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 4, "attn_implementation": "eager"}


def model_of(dtype):
    torch.manual_seed(7)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).to(dtype)


def batch_of(rank):
    tokens = torch.randint(0, 96, (4, TOKENS + 1), generator=torch.Generator().manual_seed(1))[rank : rank + 1]
    labels = {"labels": tokens[:, 1:], "position_ids": torch.arange(TOKENS)[None]}
    return {"input_ids": tokens[:, :-1], **labels}


def converted():
    model = model_of(torch.float32)
    convert(model, rank=RANK, proj_type="right", grad_dtype=torch.bfloat16)
    for layer in (module for module in model.modules() if isinstance(module, LowRankLinear)):
        make = torch.Generator().manual_seed(layer.in_features)
        layer.right.assign(torch.linalg.qr(torch.randn(layer.in_features, RANK, generator=make)).Q)
    return model


def shard(model, policy):
    """Blocks by rows, scales with their integers; the zero leaves stay outside: they own no memory to shard, and what
    they receive is scattered by a hook. Embeddings and head, sharded too, are not counted: two-block models are made of
    little else."""
    ignored = {leaf for m in model.modules() if isinstance(m, LowRankLinear) for leaf in m.leaves().values()}
    for layer in (module for module in model.modules() if isinstance(module, LowRankLinear)):
        layer.register_parameter("weight_scale", nn.Parameter(layer._buffers.pop("weight_scale"), requires_grad=False))
    for block in model.model.layers:
        fully_shard(block, ignored_params=ignored, mp_policy=policy)
    outside = {p for name, p in model.named_parameters() if ".layers." not in name}
    fully_shard(model, ignored_params=ignored | outside, mp_policy=policy)
    for module in model.modules():
        if hasattr(module, "set_gradient_divide_factor"):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    model.training_loss = types.MethodType(chunked_loss, model)
    register_fsdp_forward_method(model, "training_loss")  # chunked_loss does not call the model itself


def scatter_delta(leaf):
    """Δ's gradient, summed, of this process's rows alone."""
    size = distributed.get_world_size()
    mine = leaf.grad.new_empty(leaf.shape[0] // size, leaf.shape[1])
    distributed.reduce_scatter_tensor(mine, leaf.grad.contiguous())
    leaf.grad, leaf.rows = None, mine


def one_step(kind):
    """Bytes on the wire in a step, and how far Δ's gradients are from one process's."""
    with job("cpu") as team:
        model = converted() if kind == "int8" else model_of(torch.bfloat16)
        deltas = {name: p for name, p in model.named_parameters() if name.endswith("delta")}
        for leaf in deltas.values():
            leaf.register_post_accumulate_grad_hook(scatter_delta)
        shard(model, MixedPrecisionPolicy())
        kinds = {str(p.dtype) for n, p in model.named_parameters() if n.endswith("proj.weight")}
        with Wire() as wire:
            (model.training_loss(batch_of(team.rank)) / (TOKENS * team.size)).backward()
        rows = {name: leaf.rows.float().numpy() for name, leaf in deltas.items()}
        return dict(wire.bytes), kinds, rows


def whole_gradients(size):
    model = converted()
    for rank in range(size):
        (chunked_loss(model, batch_of(rank)) / (TOKENS * size)).backward()
    return {name: p.grad.float() for name, p in model.named_parameters() if name.endswith("delta")}


@pytest.mark.slow
def test_fsdp2_gathers_int8_and_reduces_delta_alone():
    size = 2
    ours, plain = run_in(size, one_step, "int8"), run_in(size, one_step, "bf16")
    assert ours[0][1] == {"torch.int8"}
    assert plain[0][1] == {"torch.bfloat16"}
    print("bytes on the wire:", ours[0][0], "of bf16 FSDP2's", plain[0][0])
    assert ours[0][0]["gathered"] <= 0.55 * plain[0][0]["gathered"]
    assert ours[0][0]["reduced"] <= 1.1 * RANK / WIDTH * plain[0][0]["reduced"]
    wanted = whole_gradients(size)
    for name, whole in wanted.items():
        found = torch.cat([torch.from_numpy(rows[name]) for _, _, rows in ours])
        # bf16 sums of two bf16 terms: one rounding in each order, 2⁻⁸ of the larger term
        assert float((found - whole).abs().max()) <= 2**-7 * float(whole.abs().max()), name
