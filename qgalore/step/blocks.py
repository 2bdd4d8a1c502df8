"""Taking a model apart into prologue, blocks and epilogue, without knowing the model.

The model runs as it always does, but with a stand-in for each of its blocks. In the first run the stand-ins note what
their blocks are called with, and the last one ends the run: that was the prologue. In another run they hand on what
the blocks made of it, and the model goes on to its loss: that is the epilogue. The blocks are called in between, with
the noted arguments.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks
from transformers.cache_utils import Cache

from .nested import leaves_of, replaced, tensors_in

Run = Callable[[], Tensor]  # the model and its loss on one micro-batch, a scalar
Side = tuple[nn.Module, Any]  # a module inside a block, and its output


class NotWalkableError(Exception):
    """The model cannot be walked block by block; the message says why."""


class _LastBlockReached(BaseException):
    """Ends a prologue. Not an ``Exception``, which a model may catch."""


@dataclass
class Layout:
    """The parts of a model that can be walked: its ``blocks``, in the order in which they are called.

    ``outputs``: how many values a block returns in a tuple, or None for a bare tensor. ``sides``: for each block the
    modules inside it whose outputs enter the loss by another way, as router logits do. ``outside``: the parameters
    that belong to no block. ``late``: the identities of parameters in several parts, which step when all are done.
    """

    name: str
    blocks: nn.ModuleList
    outputs: int | None = None
    sides: list[list[nn.Module]] = field(default_factory=list)
    outside: list[nn.Parameter] = field(default_factory=list)
    late: set[int] = field(default_factory=set)

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


@dataclass
class Start:
    """A micro-batch behind its prologue. ``hidden``: the first block's input, without its graph; ``edge``: where the
    graph goes on, None if nothing in the prologue trains. ``calls`` of the blocks, and the ``places`` of the hidden
    state in them. ``shared``: further arguments with a gradient, as edges and the leaves that the blocks are given
    instead. ``autocast``: device type and dtype that the blocks run under. ``leaves``: those of the prologue, by
    identity."""

    hidden: Tensor | None
    edge: GradientEdge | None
    calls: list[Call]
    places: list[int | str]
    shared: list[tuple[GradientEdge, Tensor]]
    autocast: tuple[str, torch.dtype] | None
    leaves: dict[int, Tensor]

    @property
    def trains(self) -> bool:
        """Whether gradients must reach the prologue."""
        return self.edge is not None or bool(self.shared)


class _Recorder:
    """Notes the blocks' calls, hands a mark on from each to the next, and stops at the last."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.hidden: Tensor | None = None
        self.calls: list[Call] = []
        self.marks: list[Tensor] = []
        self.autocast: tuple[str, torch.dtype] | None = None

    def act(self, number: int, args: tuple, kwargs: dict[str, Any]) -> Any:
        if number != len(self.calls):
            raise NotWalkableError(f"block {number} is called where block {len(self.calls)} is expected")
        place = self._place(number, args, kwargs)
        hidden = kwargs[place] if isinstance(place, str) else args[place]
        if number == 0:
            self.hidden, kind = hidden, hidden.device.type
            if kind != "meta" and torch.is_autocast_enabled(kind):
                self.autocast = kind, torch.get_autocast_dtype(kind)
        call = Call(tuple(map(_without_cache, args)), {n: _without_cache(v) for n, v in kwargs.items()}, place)
        self.calls.append(Call(*call.of(None), place))  # the hidden state itself is kept elsewhere
        if number == len(self.layout) - 1:
            raise _LastBlockReached
        mark = hidden.detach().requires_grad_()
        self.marks.append(mark)
        return self.layout.packed(mark)

    def _place(self, number: int, args: tuple, kwargs: dict[str, Any]) -> int | str:
        """Where the hidden state stands: for the first block by custom, for the others where the mark arrives."""
        if number:
            for place, value in [*enumerate(args), *kwargs.items()]:
                if value is self.marks[-1]:
                    return place
            raise NotWalkableError(f"the model computes something between blocks {number - 1} and {number}")
        if args and isinstance(args[0], Tensor):
            return 0
        named = [name for name, value in kwargs.items() if isinstance(value, Tensor) and value.is_floating_point()]
        if not named:
            raise NotWalkableError("the first block is called without a tensor")
        return "hidden_states" if "hidden_states" in named else named[0]


def _without_cache(value: Any) -> Any:
    """None for an empty cache of keys and values: a block that runs twice would fill it twice."""
    if isinstance(value, Cache):
        if value.get_seq_length():
            raise NotWalkableError("the blocks are given a cache that is already filled")
        return None
    return value


def prologue(layout: Layout, run: Run) -> Start:
    """Run the model as far as its last block's call, with gradients. Raises :class:`NotWalkableError`."""
    recorder = _Recorder(layout)
    with stood_in(layout.blocks, recorder.act), torch.enable_grad():
        try:
            run()
        except _LastBlockReached:
            pass
        else:
            raise NotWalkableError(f"only {len(recorder.calls)} of {len(layout)} blocks are called")
    hidden, marks = recorder.hidden, {id(mark) for mark in recorder.marks}
    assert hidden is not None, "the last block was reached without a first one"
    leaves = leaves_of([hidden])
    stand_ins: dict[int, tuple[Tensor, Tensor]] = {}

    def as_leaf(tensor: Tensor) -> Tensor:
        if not tensor.requires_grad:
            return tensor
        if id(tensor) not in stand_ins:
            behind = leaves_of([tensor])
            if not marks.isdisjoint(behind):
                raise NotWalkableError("a block's arguments carry gradients from other blocks")
            leaves.update(behind)
            stand_ins[id(tensor)] = tensor, tensor.detach().requires_grad_()
        return stand_ins[id(tensor)][1]

    calls = [call.replaced(as_leaf) for call in recorder.calls]
    edge = get_gradient_edge(hidden) if hidden.requires_grad else None
    shared = [(get_gradient_edge(tensor), leaf) for tensor, leaf in stand_ins.values()]
    places = [call.place for call in calls]
    return Start(hidden.detach(), edge, calls, places, shared, recorder.autocast, leaves)


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
) -> Tensor:
    """The loss of a micro-batch whose last block returned ``hidden``. ``places`` and ``sides`` are those of all blocks.

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

    with stood_in(layout.blocks, act), torch.enable_grad():
        return run()
