"""The beginning of a walk: a model runs up to its blocks, and what these are called with is noted."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from transformers.cache_utils import Cache

from .blocks import Call, Layout, NotWalkableError, Run, stood_in
from .nested import leaves_of


class _LastBlockReached(BaseException):
    """Ends a prologue. Not an ``Exception``, which a model may catch."""


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


def prologue(layout: Layout, run: Run, grad: bool = True) -> Start:
    """Run the model as far as its last block's call, with gradients or (not ``grad``) without. Raises
    :class:`NotWalkableError`."""
    recorder = _Recorder(layout)
    with stood_in(layout.blocks, recorder.act), torch.set_grad_enabled(grad):
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
