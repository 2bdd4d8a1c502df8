"""A block that is run again leaves out the products that no gradient reads, and no others."""

import pytest
import torch
import zoo
from walks import converted, walked

from qgalore.lowrank.layers import delta_linear
from qgalore.models.convert import convert
from qgalore.steps.trial import try_walk

DOWN = ["mlp.down_proj"]
UNREAD = {
    "llama": DOWN,
    "qwen3": DOWN,
    "gemma": DOWN,
    "gemma2": [],  # a norm follows the product, and reads it
    "gemma3": [],
    "phi3": DOWN,  # dropout follows
    "gpt_neox": ["attention.dense", "mlp.dense_4h_to_h"],  # attention and MLP stand beside each other
    "opt": ["fc2"],
    "gpt2": ["mlp.c_proj"],
    "mixtral": [],  # the router's gradients read the experts' outputs
    "qwen2_moe": [],
    "bert classifier": [],
}


def found_in(model, layout) -> list[list[str]]:
    names = {module: name for block in layout.blocks for name, module in block.named_modules()}
    return [sorted(names[layer] for layer in layers) for layers in layout.unread]


@pytest.mark.parametrize("name", UNREAD)
def test_which_products_are_left_out(name):
    model, loss = zoo.build(name)
    convert(model, rank=4)
    layout = try_walk(model, zoo.batches(name, 1)[0], loss).layout
    assert found_in(model, layout) == [UNREAD[name]] * len(layout.blocks)


@pytest.fixture
def multiplied(monkeypatch) -> list[tuple[int, int]]:
    """The shapes (in, out) of the products that are computed for an output."""
    shapes, own = [], delta_linear._output
    monkeypatch.setattr(
        delta_linear, "_output", lambda x, weight, *rest: shapes.append(weight.shape) or own(x, weight, *rest)
    )
    return shapes


def test_they_are_computed_once_and_the_gradients_keep_their_bits(multiplied):
    """32 × 64 is ``down_proj`` alone."""
    model, loss = converted("llama")
    batches = zoo.batches("llama", 2)
    trial = try_walk(model, batches[0], loss)
    multiplied.clear()
    losses, gradients = walked(model, loss, batches, trial=trial)
    ran = 2 * len(trial.layout.blocks)
    assert multiplied.count((32, 64)) == ran
    assert multiplied.count((64, 32)) == 2 * 2 * ran, "gate and up are needed in both runs"
    trial.layout.unread = [[] for _ in trial.layout.blocks]
    multiplied.clear()
    again, expected = walked(model, loss, batches, trial=trial)
    assert multiplied.count((32, 64)) == 2 * ran
    assert losses == again
    assert gradients.keys() == expected.keys()
    assert all(torch.equal(gradients[name], value) for name, value in expected.items())


class Gated(torch.nn.Module):
    """The end of an MLP: what ``end`` makes of a product and of ``gate``, a frozen parameter."""

    def __init__(self, inner, end):
        super().__init__()
        self.inner, self.end = inner, end
        self.gate = torch.nn.Parameter(torch.rand(32), requires_grad=False)

    def forward(self, x):
        return self.end(self.inner(x), self.gate)


READ = {
    "changed in place": lambda y, gate: y.sigmoid_(),
    "changed through a view": lambda y, gate: y.view(-1)[::2].relu_().sum() + y,
    "masked by itself": lambda y, gate: y * (y > 0),
    "masked by itself as a number": lambda y, gate: y * (y > 0).to(y.dtype),
    "scaled by a parameter that may train later": lambda y, gate: y * gate,
}
NOT_READ = {"scaled by a number": lambda y, gate: 0.5 * y, "added in place": lambda y, gate: y.add_(1.0)}


@pytest.mark.parametrize("how", READ | NOT_READ)
def test_what_is_done_with_a_product_decides(how):
    model, loss = zoo.build("llama")
    convert(model, rank=4)
    for layer in model.model.layers:
        layer.mlp = Gated(layer.mlp, (READ | NOT_READ)[how])
    layout = try_walk(model, zoo.batches("llama", 1)[0], loss).layout
    expected = [] if how in READ else ["mlp.inner.down_proj"]
    assert found_in(model, layout) == [expected] * len(layout.blocks)


@pytest.mark.parametrize("where", ["mlp.down_proj", "mlp", ""])
def test_a_hook_that_comes_later_sees_no_zeros(where):
    model, loss = converted("llama")
    batches, seen = zoo.batches("llama", 1), []
    trial = try_walk(model, batches[0], loss)
    watched = model.model.layers[1].get_submodule(where)
    watched.register_forward_hook(lambda module, given, output: seen.append(output.detach().clone()))
    walked(model, loss, batches, trial=trial)
    first, again = seen
    assert torch.equal(first, again)
    assert trial.layout.unread[0], "other blocks go on as before"


def test_a_hook_sees_every_output():
    model, loss = zoo.build("llama")
    convert(model, rank=4)
    model.model.layers[1].mlp.down_proj.register_forward_hook(lambda *_: None)
    layout = try_walk(model, zoo.batches("llama", 1)[0], loss).layout
    assert found_in(model, layout) == [DOWN, [], DOWN]


def test_products_of_integers_are_left_out_too():
    """With the same bits, and a trial of the output that is due is left to a run that computes it."""
    results = []
    for leave in (True, False):
        model, loss = zoo.build("llama")
        convert(model, rank=4, group_size="row", compute="int8")
        batches = zoo.batches("llama", 2)
        trial = try_walk(model, batches[0], loss)
        if not leave:
            trial.layout.unread = [[] for _ in trial.layout.blocks]
        results.append(walked(model, loss, batches, trial=trial))
    (losses, gradients), (again, expected) = results
    assert losses == again
    assert all(torch.equal(gradients[name], value) for name, value in expected.items())
