"""Taking a model apart into prologue, blocks and epilogue, without knowing the model.

The model runs as it always does, but with a stand-in for each of its blocks. In the first run the stand-ins note what
their blocks are called with, and the last one ends the run: that was the prologue (see the module of that name). In
another run they hand on what the blocks made of it, and the model goes on to its loss: that is the epilogue. The blocks
are called in between, with the noted arguments.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..lowrank.layers.linear import LowRankLinear
from .nested import replaced, tensors_in

Run = Callable[[], Tensor]  # the model and its loss on one micro-batch, a scalar
Side = tuple[nn.Module, Any]  # a module inside a block, and its output


class NotWalkableError(Exception):
    """The model cannot be walked block by block; the message says why."""


@dataclass
class Layout:
    """The parts of a model that can be walked: its ``blocks``, in the order in which they are called.

    ``outputs``: how many values a block returns in a tuple, or None for a bare tensor. ``sides``: for each block the
    modules inside it whose outputs enter the loss by another way, as router logits do. ``unread``: for each block the
    layers whose outputs no gradient reads (see the module of that name). ``outside``: the parameters
    that belong to no block. ``late``: the identities of parameters in several parts, which step when all are done.
    ``before`` and ``behind``: of parameters that train there, in front of the blocks and behind them.
    """

    name: str
    blocks: nn.ModuleList
    outputs: int | None = None
    sides: list[list[nn.Module]] = field(default_factory=list)
    unread: list[list[LowRankLinear]] = field(default_factory=list)
    outside: list[nn.Parameter] = field(default_factory=list)
    late: set[int] = field(default_factory=set)
    before: set[int] = field(default_factory=set)
    behind: set[int] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self.blocks)

    def packed(self, hidden: Tensor) -> Any:
        """``hidden`` as the model expects it from a block."""
        return hidden if self.outputs is None else (hidden, *[None] * (self.outputs - 1))


class StandIn(nn.Module):
    """Stands in a model in the place of ``block``: answers for its attributes, and calls ``act(number, args, kwargs)``
    where the block would be called."""

    def __init__(self, block: nn.Module, number: int, act: Callable[[int, tuple, dict], Any]) -> None:
        super().__init__()
        self.__dict__.update(block=block, number=number, act=act)  # past nn.Module, which would register the block

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["act"](self.__dict__["number"], args, kwargs)


@contextmanager
def stood_in(blocks: nn.ModuleList, act: Callable[[int, tuple, dict], Any]) -> Iterator[None]:
    """Inside, every block of the list is replaced by a :class:`StandIn`."""
    own = list(blocks)
    try:
        for number, block in enumerate(own):
            blocks[number] = StandIn(block, number, act)
        yield
    finally:
        for number, block in enumerate(own):
            blocks[number] = block


@contextmanager
def without_checkpointing(blocks: nn.ModuleList) -> Iterator[None]:
    """Inside, transformers' checkpointing of the blocks is off: a walk keeps their inputs itself."""
    marked: list[Any] = [m for m in blocks.modules() if getattr(m, "gradient_checkpointing", False)]
    for module in marked:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in marked:
            module.gradient_checkpointing = True


@dataclass
class Call:
    """What a block is called with; ``place`` is the position or the name of the hidden state among it."""

    args: tuple
    kwargs: dict[str, Any]
    place: int | str

    def of(self, hidden: Tensor | None) -> tuple[tuple, dict[str, Any]]:
        """The arguments with ``hidden`` in its place."""
        if isinstance(self.place, str):
            return self.args, {**self.kwargs, self.place: hidden}
        return (*self.args[: self.place], hidden, *self.args[self.place + 1 :]), self.kwargs

    def replaced(self, change: Callable[[Any], Any], kind: type = Tensor) -> "Call":
        """See the function :func:`replaced`."""
        return Call(replaced(self.args, change, kind), replaced(self.kwargs, change, kind), self.place)


def _discard(_: Tensor) -> None:
    return None


def _never(_: Any) -> Tensor:
    raise RuntimeError("a graph whose tensors were discarded is asked for a gradient")


def graph_discarded() -> AbstractContextManager:
    """Gradients are on, but what autograd would save is thrown away.

    The forward pass runs so, and not without gradients, because the backward pass runs the block again with them: what
    looks at that (a compiled graph, a trial of int8 products, a choice of kernels) must decide alike both times.
    """
    return saved_tensors_hooks(_discard, _never)


def run_block(
    layout: Layout, number: int, call: Call, hidden: Tensor, autocast: tuple[str, torch.dtype] | None
) -> tuple[Tensor, list[Side]]:
    """Block ``number`` on ``hidden``: its output, and the outputs of its modules in ``layout.sides``."""
    sides: list[Side] = []
    handles = [
        module.register_forward_hook(lambda module, _, output: sides.append((module, output)))
        for module in (layout.sides[number] if layout.sides else ())
    ]
    args, kwargs = call.of(hidden)
    context = nullcontext() if autocast is None else torch.autocast(*autocast)
    try:
        with context:
            output = layout.blocks[number](*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return (output if isinstance(output, Tensor) else output[0]), sides


def as_leaves(sides: list[Side]) -> list[Side]:
    """The outputs without their graphs, as leaves where they had one."""
    return [(m, replaced(output, lambda t: t.detach().requires_grad_(t.requires_grad))) for m, output in sides]


def with_gradient(sides: list[Side]) -> list[Tensor]:
    """The tensors of ``sides`` that carry a gradient, in a fixed order."""
    return [tensor for _, output in sides for tensor in tensors_in(output) if tensor.requires_grad]


def observers(module: nn.Module) -> list[Callable]:
    """transformers' hooks on ``module`` that collect its outputs for the model to return, or for a loss."""
    hooks = module._forward_hooks.values()
    return [hook for hook in hooks if getattr(hook, "__module__", "").startswith("transformers.")]


def epilogue(
    layout: Layout,
    run: Run,
    places: Sequence[int | str],
    hidden: Tensor,
    sides: Sequence[list[Side]],
    last: Callable[[], None],
    grad: bool = True,
) -> Tensor:
    """The loss of a micro-batch whose last block returned ``hidden``, with its graph or (not ``grad``) without.
    ``places`` and ``sides`` are those of all blocks.

    transformers collects some outputs by hooks on modules inside the blocks. No block runs here, so its stand-in calls
    these hooks with the outputs that were kept. ``last()`` is called where the last block would have ended.
    """

    def act(number: int, args: tuple, kwargs: dict[str, Any]) -> Any:
        for module, output in sides[number]:
            for hook in observers(module):
                hook(module, (), output)
        if number < len(layout) - 1:
            place = places[number]
            return layout.packed(kwargs[place] if isinstance(place, str) else args[place])
        last()
        return layout.packed(hidden)

    with stood_in(layout.blocks, act), torch.set_grad_enabled(grad):
        return run()
