"""Checkpointed blocks give the same gradients, wherever their inputs wait."""

import pytest
import torch
from torch import nn

from qgalore.errors import ConfigError
from qgalore.models.convert import convert
from qgalore.models.recompute import FUNCTIONS, checkpoint_blocks


def gradients(model, tokens):
    model.train()
    model(input_ids=tokens, use_cache=False).logits.float().square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("where", FUNCTIONS)
def test_gradients_do_not_change(tiny_llama, device, where):
    """The recomputed block is the block: every gradient has the same bits. (From a CPU nothing is moved.)"""
    tokens = torch.arange(48, device=device).view(2, 24)
    plain, checkpointed = tiny_llama(device), tiny_llama(device)
    for model in (plain, checkpointed):
        convert(model, rank=8)
    checkpoint_blocks(checkpointed, where)
    first, second = gradients(plain, tokens), gradients(checkpointed, tokens)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("where", FUNCTIONS)
def test_blocks_run_again_in_backward(tiny_llama, where):
    model = tiny_llama()
    calls = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    checkpoint_blocks(model, where)
    gradients(model, torch.arange(24).view(1, 24))
    assert len(calls) == 2


def test_the_last_blocks_may_run_once(tiny_llama):
    model = tiny_llama(num_hidden_layers=3)
    calls = []
    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, n=number: calls.append(n))
    checkpoint_blocks(model, "device", but_last=2)
    gradients(model, torch.arange(24).view(1, 24))
    assert calls == [0, 1, 2, 0]


def test_a_model_without_such_blocks_is_refused():
    with pytest.raises(ConfigError, match="activation_checkpointing=false"):
        checkpoint_blocks(nn.Linear(2, 2), "device")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_inputs_wait_in_host_memory(tiny_llama):
    """A block's input leaves the device: less of it is held after the forward pass."""
    held = {}
    for where in FUNCTIONS:
        model = tiny_llama("cuda", num_hidden_layers=8)
        checkpoint_blocks(model, where)
        model.train()
        tokens = torch.zeros(64, 64, dtype=torch.int64, device="cuda")
        before = torch.cuda.memory_allocated()
        hidden = model.model(input_ids=tokens, use_cache=False)[0]
        held[where] = torch.cuda.memory_allocated() - before
        del hidden, model
    assert held["host"] < held["device"] / 2
