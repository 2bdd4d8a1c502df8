"""A converted model whose int8 weights nobody would move says so in its first backward pass, and in no other case."""

import copy
import gc
import pickle
import re

import pytest
import torch

import qgalore
from qgalore.errors import ConfigError

REFUSED = (
    r"received a gradient, but no qgalore\.optimizer .*qgalore\.optimizer\(model, lr=\.\.\.\).*requires_grad_\(False"
)


@pytest.fixture
def model(tiny_llama):
    made = tiny_llama()
    qgalore.convert(made, rank=8)
    return made


@pytest.fixture
def tokens(token_batches):
    return token_batches(steps=1)[0]


def backward(model, tokens):
    model(input_ids=tokens, labels=tokens).loss.backward()


def complaint(model, tokens):
    """What a backward pass is refused with, or nothing."""
    try:
        backward(model, tokens)
    except ConfigError as error:
        return str(error)
    return ""


def freeze(module):
    for parameter in module.parameters():
        parameter.requires_grad_(False)


def test_another_optimizer_is_refused_before_its_first_step(model, tokens):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.optim.AdamW(model.parameters())
    assert re.match(r"layer model\.layers\.1\.mlp\.down_proj " + REFUSED, complaint(model, tokens))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_optimizer_of_another_model_does_not_count(model, tokens, tiny_llama):
    other = tiny_llama()
    qgalore.convert(other, rank=8)
    opt = qgalore.optimizer(other, lr=1e-3)
    assert re.search(REFUSED, complaint(model, tokens))
    backward(other, tokens)
    opt.step()


@pytest.mark.parametrize("stepping", ["deferred", "fused", "manual"])
def test_an_optimizer_made_late_counts_and_one_that_was_dropped_does_not(model, tokens, stepping):
    """Dropped, it leaves the probes on in this first step: their gradients are guarded as Δ's are."""
    loss = model(input_ids=tokens, labels=tokens).loss
    opt = qgalore.optimizer(model, lr=1e-3, stepping=stepping)
    backward(model, tokens)
    del loss, opt
    gc.collect()
    assert re.search(REFUSED, complaint(model, tokens))
    opt = qgalore.optimizer(model, lr=1e-3)
    backward(model, tokens)
    assert opt.pending()


def test_what_moves_no_weight_is_not_refused(model, tokens):
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            model(input_ids=tokens)
    inputs = model.get_input_embeddings()(tokens).detach().requires_grad_()
    found = torch.autograd.grad(model(inputs_embeds=inputs).logits.sum(), inputs)[0]
    assert found.abs().sum() > 0
    freeze(model)
    model(inputs_embeds=inputs).logits.sum().backward()
    assert torch.allclose(inputs.grad, found)


def test_a_frozen_layer_needs_nobody_and_one_freed_later_does(model, tokens):
    first = model.model.layers[0]
    freeze(first)
    opt = qgalore.optimizer(model, lr=1e-3)
    backward(model, tokens)
    opt.step()
    first.mlp.up_proj.delta.requires_grad_(True)
    assert re.match(r"layer model\.layers\.0\.mlp\.up_proj " + REFUSED, complaint(model, tokens))


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_belongs_to_no_optimizer_yet(model, tokens, twin_of):
    opt = qgalore.optimizer(model, lr=1e-3)
    twin = twin_of(model)
    assert re.search(REFUSED, complaint(twin, tokens))
    backward(model, tokens)
    assert opt.pending()
    own = qgalore.optimizer(twin, lr=1e-3)
    backward(twin, tokens)
    assert own.pending()


def test_a_moved_or_cast_model_keeps_its_guards(model, tokens):
    assert re.search(REFUSED, complaint(model.to(torch.float64).to(torch.float32), tokens))


def test_it_holds_in_compiled_blocks(model, tokens):
    model.model.layers[1].mlp.compile(backend="eager")
    assert re.search(REFUSED, complaint(model, tokens))
    opt = qgalore.optimizer(model, lr=1e-3, stepping="manual")
    backward(model, tokens)
    assert opt.pending()
