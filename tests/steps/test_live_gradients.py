"""However many micro-batches a step has, gradients never exist beyond those of one block."""

import pytest
import torch
import zoo

import qgalore
from qgalore.steps import api

COUNT = 8


def leaf_bytes(module, rule):
    """Bytes of all gradients that a step may leave in ``module``, summed in fp32: Δ's, or the whole ones."""
    found = 0
    for name, parameter in module.named_parameters():
        kind = name.rsplit(".", 1)[-1]
        if parameter.is_floating_point() and kind != ("delta" if rule != "galore" else "probe"):
            found += 4 * parameter.numel()
    return found


@pytest.mark.parametrize("rule", ["galore", "scale"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_one_block_exist_at_a_time(rule, dtype):
    model, loss = zoo.build("llama")
    model.to(dtype)
    qgalore.convert(model, rank=4 if rule == "galore" else None)
    optimizer = qgalore.optimizer(model, lr=0.01, rule=rule, update_proj_gap=50, stepping="manual")
    parts = [*model.model.layers, model.lm_head, model.model.embed_tokens]
    most = max(leaf_bytes(part, rule) for part in parts) + leaf_bytes(model.model.norm, rule)
    leaves = [leaf for tensor in optimizer.tensors for leaf in tensor.leaves()]
    batches = zoo.batches("llama", 2 * COUNT)
    api.step(model, optimizer, batches[:COUNT], loss=loss)  # finds the bases, from whole gradients
    live = []

    def look(_):
        live.append(sum(leaf.grad.nbytes for leaf in leaves if leaf.grad is not None))

    for leaf in leaves:
        leaf.requires_grad and leaf.register_post_accumulate_grad_hook(look)
    api.step(model, optimizer, batches[COUNT:], loss=loss)
    assert len(live) >= COUNT * len(parts)
    assert most / 2 < max(live) <= most
    assert all(leaf.grad is None for leaf in leaves)
