"""What can be walked is found by trying; what cannot says why, and is accumulated as usual."""

from functools import partial

import pytest
import torch
import zoo
from torch import nn

from qgalore.steps import walk as walking
from qgalore.steps.trial import try_walk


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.drop = nn.Dropout(0.2)

    def forward(self, x, extra=None):
        return x + self.drop(torch.tanh(self.linear(x))) + (0 if extra is None else extra)


class Plain(nn.Module):
    """Blocks in a list, in the simplest way; the classes below do something that a walk cannot follow."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(4, 8), nn.Linear(8, 1)
        self.blocks = nn.ModuleList([Block(), Block(), Block()])

    def body(self, x):
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x):
        return self.leave(self.body(self.enter(x))).square().mean()


class Twice(Plain):
    def body(self, x):
        return super().body(super().body(x))


class Backwards(Plain):
    def body(self, x):
        for block in reversed(self.blocks):
            x = block(x)
        return x


class SomethingBetween(Plain):
    def body(self, x):
        for block in self.blocks:
            x = block(x) * 1.5
        return x


class FromOtherBlocks(Plain):
    def body(self, x):
        first = self.blocks[0](x)
        return self.blocks[2](self.blocks[1](first), extra=first.tanh())


class BySideWay(Plain):
    """The last block finds what the first one left in an attribute."""

    def body(self, x):
        for block in self.blocks:
            x = block(x, self.blocks[0].__dict__.get("left") if block is self.blocks[2] else None)
            if block is self.blocks[0]:
                block.__dict__["left"] = x
        return x


class LeavesATrace(Block):
    def forward(self, x):
        self.__dict__["trace"] = torch.tanh(self.linear(x))
        return x + self.trace


class TakesATrace(Plain):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([LeavesATrace(), LeavesATrace()])

    def forward(self, x):
        return super().forward(x) + self.blocks[0].trace.square().mean()


class ReadsATrace(LeavesATrace):
    """Takes what another block left, without being given it."""

    def __init__(self, other):
        super().__init__()
        self.__dict__["other"] = other

    def forward(self, x):
        return super().forward(x) + self.other.trace


class TakesATraceInside(Plain):
    def __init__(self):
        super().__init__()
        first = LeavesATrace()
        self.blocks = nn.ModuleList([first, LeavesATrace(), ReadsATrace(first)])


class KnowsItsInputs(Plain):
    """Without a trace in a gradient: the second block's value depends on a number that the first one left."""

    def body(self, x):
        scale = 1.0
        for block in self.blocks:
            x = block(x, extra=torch.full_like(x, scale))
            scale = float(x.detach().mean())
        return x


class NoList(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 1)

    def forward(self, x):
        return self.linear(x).square().mean()


class LearnedArgument(Plain):
    """Every block is given the same vector, which trains: a bias of positions, say."""

    def __init__(self):
        super().__init__()
        self.vector = nn.Parameter(torch.randn(8))

    def body(self, x):
        shared = self.vector.tanh()
        for block in self.blocks:
            x = block(x, extra=shared)
        return x


class SharedInside(Plain):
    """Two blocks hold the same layer."""

    def __init__(self):
        super().__init__()
        self.blocks[2].linear = self.blocks[0].linear


def loss_of(model, batch):
    return model(batch)


def make(kind):
    torch.manual_seed(1)
    return kind().train(), [torch.randn(5, 4, generator=torch.Generator().manual_seed(n)) for n in range(3)]


REASONS = {
    Twice: "no list of blocks that are called once each",
    Backwards: "no list of blocks that are called once each",
    NoList: "no list of blocks that are called once each",
    SomethingBetween: "computes something between blocks 0 and 1",
    FromOtherBlocks: "arguments carry gradients from other blocks",
    BySideWay: "arguments carry gradients from other blocks",
    TakesATrace: "what follows the blocks takes something with a gradient from an earlier block",
    TakesATraceInside: "block 2 takes something with a gradient from an earlier block",
    KnowsItsInputs: "when walked, and",
}


@pytest.mark.parametrize("kind", REASONS, ids=lambda kind: kind.__name__)
def test_what_cannot_be_walked_says_why_in_one_line(kind):
    model, batches = make(kind)
    before = torch.get_rng_state()
    trial = try_walk(model, batches[0], loss_of)
    assert trial.layout is None
    assert REASONS[kind] in trial.why
    assert "ordinary accumulation" in str(trial)
    assert "\n" not in str(trial)
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), before)
    assert all(isinstance(block, Block) for block in getattr(model, "blocks", ()))


@pytest.mark.parametrize("kind", [Plain, LearnedArgument, SharedInside])
def test_models_of_ones_own(kind):
    model, batches = make(kind)
    layout = try_walk(model, batches[0], loss_of).layout
    assert layout.name == "blocks"
    zoo.batch_major(model, list(layout.blocks), batches, loss_of)
    expected = zoo.gradients(model)
    model.zero_grad()
    names, found = {id(p): name for name, p in model.named_parameters()}, {}

    def step(_, parameters):
        for parameter in parameters:
            if parameter.grad is not None:
                assert names[id(parameter)] not in found
                found[names[id(parameter)]] = parameter.grad
                parameter.grad = None

    walking.walk(
        layout,
        [partial(lambda batch: loss_of(model, batch) / 50, batch) for batch in batches],
        reseed=partial(walking.reseed, 5, 0),
        decide=lambda _: True,
        step=step,
        activations=walking.Activations(),
    )
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-8)


def test_the_stepping_of_a_layer_in_two_blocks_waits():
    model, batches = make(SharedInside)
    late = try_walk(model, batches[0], loss_of).layout.late
    assert late == {id(p) for p in model.blocks[0].linear.parameters()}


def test_the_largest_list_is_walked():
    model, loss = zoo.build("mixtral")
    model.extra = nn.ModuleList([nn.Linear(2, 2)])
    assert try_walk(model, zoo.batches("mixtral", 1)[0], loss).layout.name == "model.layers"


def test_router_logits_are_kept_and_attention_is_not():
    model, loss = zoo.build("mixtral")
    layout = try_walk(model, zoo.batches("mixtral", 1)[0], loss).layout
    assert [[type(module).__name__ for module in side] for side in layout.sides] == [["MixtralTopKRouter"]] * 3


def test_an_error_of_the_model_itself_is_not_hidden():
    model, _ = make(Plain)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        try_walk(model, torch.randn(5, 3), loss_of)


def test_a_meta_model_is_walked_for_a_plan():
    model, loss = zoo.build("llama")
    batch = {name: value.to("meta") for name, value in zoo.batches("llama", 1)[0].items()}
    batch["attention_mask"] = torch.ones(1, 1, 16, 16, dtype=torch.bool, device="meta")
    del batch["position_ids"]
    assert try_walk(model.to("meta"), batch, loss).layout is not None


@pytest.mark.parametrize("taken", [True, False])
def test_accumulation_decides_before_it_steps(taken):
    model, batches = make(Twice)
    steps = []
    losses = walking.accumulate(
        model,
        [partial(loss_of, model, batch) for batch in batches],
        reseed=partial(walking.reseed, 5, 0),
        decide=lambda _: taken,
        step=lambda part, parameters: steps.append((part, len(parameters))),
    )
    assert len(losses) == 3
    assert steps == ([("model", 10)] if taken else [])
    assert any(p.grad is not None for p in model.parameters()) == taken


def test_accumulation_draws_other_dropout_for_each_micro_batch():
    model, batches = make(Twice)
    same = [partial(loss_of, model, batches[0])] * 2
    taking = {"reseed": partial(walking.reseed, 5, 0), "decide": lambda _: False, "step": None}
    first, again = walking.accumulate(model, same, **taking), walking.accumulate(model, same, **taking)
    assert torch.equal(first, again)
    assert first[0] != first[1]
