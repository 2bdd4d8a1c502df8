"""The layer-major step: forward, decide, backward.

All micro-batches go through one block before the next one begins, in both directions. So the gradients of one block
exist at a time, whatever the number of micro-batches is, and the loss of the whole step is known before any weight
moves.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..quant.counter import derive_key
from . import blocks
from .activations import Activations
from .blocks import Layout, Run
from .prologue import Start, prologue
from .turns import AlwaysThere, Turns
from .unread import left_out

Reseed = Callable[[int, int], None]  # of a micro-batch, by its place in the sequence of runs, and a part of the model
Decide = Callable[[Tensor], bool]
Step = Callable[[str, list[nn.Parameter]], None]
Attempt = Callable[[Callable[[], Any]], None]


def reseed(seed: int, step: int, number: int, part: int) -> None:
    """Seed torch's generators for one part of one micro-batch of a step, so that dropout draws the same values whenever
    that part runs. ``part``: 0 is the prologue, 1 … L are the blocks, L + 1 is the epilogue."""
    torch.manual_seed(derive_key(seed, step, number, part)[0] & 0x7FFFFFFF)


def walk(
    layout: Layout,
    runs: Sequence[Run],
    *,
    reseed: Reseed,
    decide: Decide,
    step: Step,
    activations: Activations,
    turns: Turns | None = None,
    attempt: Attempt = lambda work: work(),
    settle: Callable[[], None] = lambda: None,
) -> Tensor:
    """One step over the micro-batches of ``runs``; returns their losses, fp32 (K,), as ``decide`` got them.

    Each of ``runs`` computes a micro-batch's share of the step's loss, a scalar: their sum is what is minimised.
    ``decide(losses)`` is called when no weight has moved yet: False ends the step there, without gradients. Then
    ``step(name, parameters)`` is called for the epilogue, and for every block from the last to the first with all of
    the block's parameters (a mixture's expert may have no gradient). They have got all of their gradients: it steps
    them and drops these gradients. The last call, for the prologue, gets all parameters that still have a gradient:
    also those of several parts, and those that ``step`` chose to keep. ``turns`` hears of every block's turn, for
    weights that are not always there.

    ``attempt`` does all work that hangs on this process's micro-batches, and may keep its error for later: parts and
    turns then go on in their order. ``settle``, which is called before ``decide``, raises what was kept.

    Raises :class:`NotWalkableError` if a micro-batch takes another way through the model than the trial's did.
    """
    turns, whole = turns or AlwaysThere(), False
    going = _Pass(layout, list(runs), reseed, activations, turns, attempt)
    with blocks.without_checkpointing(layout.blocks):
        try:
            turns.begin()
            going.forward()
            found: list[Tensor] = []
            turns.enter(len(layout), backward=False)
            attempt(lambda: found.extend(map(going.epilogue, range(len(runs)))))
            settle()
            losses = torch.stack(found)
            if decide(losses):
                step("epilogue", _complete(layout.outside, layout.late))
                for number in reversed(range(going.first, len(layout))):
                    turns.enter(number, backward=True)
                    attempt(partial(going.backward, number))
                    step(f"block {number}", [p for p in layout.blocks[number].parameters() if id(p) not in layout.late])
                    turns.leave(number, stepped=True)
                turns.enter(-1, backward=True)
                attempt(going.backward_of_prologue)
                step("prologue", _complete(going.parameters()))
            else:
                _drop(going.parameters())
            whole = True
        except BaseException:
            _drop(going.parameters())
            raise
        finally:
            activations.clear()
            turns.end(whole)
    return losses


def accumulate(model: nn.Module, runs: Sequence[Run], *, reseed: Reseed, decide: Decide, step: Step) -> Tensor:
    """:func:`walk` for a model that cannot be walked: one block that is the whole model. The gradients of all of its
    tensors exist together."""
    losses = []
    for number, run in enumerate(runs):
        reseed(number, 0)
        with torch.enable_grad():
            loss = run()
        loss.backward()
        losses.append(loss.detach().to(torch.float32))
    losses = torch.stack(losses)
    if decide(losses):
        step("model", _complete(model.parameters()))
    else:
        _drop(model.parameters())
    return losses


def _complete(parameters: Iterable[nn.Parameter], late: Collection[int] = ()) -> list[nn.Parameter]:
    """Those that have a gradient to which no other part adds."""
    return [p for p in parameters if p.grad is not None and id(p) not in late]


def _drop(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


@dataclass
class _Pass:
    """What a walk knows between its calls. ``first``: the lowest block that must be walked back through. ``sides`` and
    ``side_gradients`` have an entry for each micro-batch, in it one for each block."""

    layout: Layout
    runs: list[Run]
    reseed: Reseed
    kept: Activations
    turns: Turns
    attempt: Attempt
    first: int = 0
    starts: list[Start] = field(default_factory=list)
    sides: list[list[list[blocks.Side]]] = field(default_factory=list)
    side_gradients: list[list[list[Tensor | None]]] = field(default_factory=list)

    def forward(self) -> None:
        """All prologues, then all micro-batches through each block. What the way back needs is kept."""
        self.attempt(self._prologues)
        for block in range(len(self.layout)):
            self.turns.enter(block, backward=False)
            self.attempt(partial(self._forward_all, block))
            self.turns.leave(block, stepped=False)

    def _prologues(self) -> None:
        for number, run in enumerate(self.runs):
            self.reseed(number, 0)
            start = prologue(self.layout, run)
            assert start.hidden is not None, "a prologue gives a hidden state"
            self.kept.inputs.put(0, number, start.hidden)
            self.kept.arguments.put(number, start.calls)
            start.hidden, start.calls = None, []
            self.starts.append(start)
            self.sides.append([[] for _ in self.layout.blocks])
        self.side_gradients = [[] for _ in self.runs]
        self.first = self._lowest()

    def _lowest(self) -> int:
        if any(start.trains for start in self.starts):
            return 0
        trains = (any(p.requires_grad for p in block.parameters()) for block in self.layout.blocks)
        return next((number for number, yes in enumerate(trains) if yes), len(self.layout))

    def _forward_all(self, block: int) -> None:
        for number in range(len(self.runs)):
            self._forward(block, number)

    def _forward(self, block: int, number: int) -> None:
        last = number == len(self.runs) - 1
        ahead = (block + 1, 0) if last else (block, number + 1)
        graph = block >= self.first and self.kept.graphs.keeps(block, len(self.layout))
        hidden = self.kept.inputs.get(block, number, drop=graph or block < self.first, ahead=ahead)
        hidden = self._leaf(hidden, block)
        self.reseed(number, block + 1)
        how = nullcontext if graph else blocks.graph_discarded
        with torch.enable_grad(), torch.no_grad() if block < self.first else how():
            output, sides = self._run(block, number, hidden)
        if graph:
            self.kept.graphs.put(block, number, (hidden, output, blocks.with_gradient(sides)))
        self.sides[number][block] = blocks.as_leaves(sides)
        self.kept.inputs.put(block + 1, number, output.detach())

    def _run(self, block: int, number: int, hidden: Tensor) -> tuple[Tensor, list[blocks.Side]]:
        call = self.kept.arguments.get(block, number)
        return blocks.run_block(self.layout, block, call, hidden, self.starts[number].autocast)

    def _leaf(self, hidden: Tensor, block: int) -> Tensor:
        """``hidden`` as the input of ``block``, with a gradient where something below it trains."""
        below = block > self.first or any(start.trains for start in self.starts)
        return hidden.detach().requires_grad_(below)

    def epilogue(self, number: int) -> Tensor:
        """Forward and back through the epilogue of a micro-batch: its loss, fp32."""
        top = len(self.layout)
        ahead = (top, number + 1)
        hidden = self._leaf(self.kept.inputs.get(top, number, ahead=ahead), top)
        self.reseed(number, 0)
        sides, start = self.sides[number], self.starts[number]
        loss = blocks.epilogue(
            self.layout, self.runs[number], start.places, hidden, sides, lambda: self.reseed(number, top + 1)
        )
        loss.backward()
        self.side_gradients[number] = [[leaf.grad for leaf in blocks.with_gradient(side)] for side in sides]
        self.sides[number] = []
        if hidden.requires_grad:
            self.kept.gradients.put(top, number, _or_zeros(hidden))
        return loss.detach().to(torch.float32)

    def backward(self, block: int) -> None:
        """All micro-batches back through ``block``."""
        for number in range(len(self.runs)):
            self._backward(block, number)

    def _backward(self, block: int, number: int) -> None:
        last = number == len(self.runs) - 1
        ahead = (block, 0) if last else (block + 1, number + 1)
        gradient = self.kept.gradients.get(block + 1, number, ahead=ahead)
        hidden, output, sides = self._again(block, number, (block - 1, 0) if last else (block, number + 1))
        pairs = [(output, gradient), *zip(sides, self.side_gradients[number][block], strict=True)]
        pairs = [(tensor, g) for tensor, g in pairs if g is not None]
        torch.autograd.backward(*map(list, zip(*pairs, strict=True)))
        if hidden.requires_grad:
            self.kept.gradients.put(block, number, _or_zeros(hidden))

    def _again(self, block: int, number: int, ahead: tuple[int, int]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Input, output and side outputs of a block with the graph between them, kept or made by running it again."""
        if self.kept.graphs.keeps(block, len(self.layout)):
            return self.kept.graphs.get(block, number)
        hidden = self._leaf(self.kept.inputs.get(block, number, ahead=ahead), block)
        self.reseed(number, block + 1)
        with torch.enable_grad(), left_out(self.layout.blocks[block], self.layout.unread[block]):
            output, sides = self._run(block, number, hidden)
        return hidden, output, blocks.with_gradient(sides)

    def backward_of_prologue(self) -> None:
        """Back through what comes before the blocks, where it trains."""
        for number, start in enumerate(self.starts):
            edges = [(edge, leaf.grad) for edge, leaf in start.shared if leaf.grad is not None]
            if start.edge is not None:
                edges.insert(0, (start.edge, self.kept.gradients.get(0, number, ahead=(0, number + 1))))
            if edges:
                torch.autograd.backward([edge for edge, _ in edges], [gradient for _, gradient in edges])

    def parameters(self) -> list[nn.Parameter]:
        """All parameters of the model, those of the blocks last."""
        return [*self.layout.outside, *self.layout.blocks.parameters()]


def _or_zeros(leaf: Tensor) -> Tensor:
    """The gradient of ``leaf``, zeros if none arrived."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
