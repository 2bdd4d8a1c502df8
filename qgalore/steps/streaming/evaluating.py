"""Losses without gradients of a model whose blocks are streamed: a block is fetched once for many micro-batches."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ..activations import Activations
from ..blocks import Layout, NotWalkableError, Run, Side, epilogue, run_block
from ..nested import tensors_in
from ..prologue import Start, prologue
from .stream import Stream


def losses(
    layout: Layout, runs: Iterable[Run], kept: Activations, stream: Stream, micro_batches: int
) -> Iterator[Tensor]:
    """What each of ``runs`` gives, without gradients, in their order and to the same bits as ``run()`` alone.

    So many of them go through a block in its turn as have room where a training step of ``micro_batches`` keeps the
    inputs of all blocks in ``kept``. If the model takes another way than in the trial of the walk, a line says so, and
    the runs are taken one by one.
    """
    waiting, most = iter(runs), 1
    while True:
        group: list[Run] = []
        starts: list[Start] = []
        try:
            while len(group) < most and (run := next(waiting, None)) is not None:
                group.append(run)
                start = prologue(layout, run, grad=False)
                most = _room(start, len(layout), micro_batches)
                _keep(kept, len(starts), start)
                starts.append(start)
            found = _through(layout, group, starts, kept, stream)
        except NotWalkableError as reason:
            print(f"note: held-out batches are taken one by one through streamed blocks: {reason}", flush=True)
            yield from (_alone(run) for run in (*group, *waiting))
            return
        finally:
            kept.clear()
        if not group:
            return
        yield from found


def _alone(run: Run) -> Tensor:
    with torch.no_grad():
        return run()


def _room(start: Start, blocks: int, micro_batches: int) -> int:
    """How many micro-batches such as that of ``start`` have room in the memory of a step's: each keeps one hidden state
    and its arguments, where those of a step keep a hidden state for every one of the ``blocks``."""
    assert start.hidden is not None, "a prologue gives a hidden state"
    own = {id(tensor): tensor.nbytes for call in start.calls for tensor in tensors_in((call.args, call.kwargs))}
    arguments, hidden = sum(own.values()), start.hidden.nbytes
    return max(1, micro_batches * (blocks * hidden + arguments) // (hidden + arguments))


def _keep(kept: Activations, number: int, start: Start) -> None:
    assert start.hidden is not None, "a prologue gives a hidden state"
    kept.inputs.put(0, number, start.hidden)
    kept.arguments.put(number, start.calls)
    start.hidden, start.calls = None, []


@torch.no_grad()
def _through(
    layout: Layout, group: Sequence[Run], starts: Sequence[Start], kept: Activations, stream: Stream
) -> list[Tensor]:
    """The losses of the ``group``, whose beginnings are kept."""
    sides: list[list[list[Side]]] = [[] for _ in group]
    last = len(layout)
    if not group:
        return []

    def turn(block: int) -> None:
        for number, start in enumerate(starts):
            hidden = kept.inputs.get(block, number, ahead=_next(block, number, len(group)))
            call = kept.arguments.get(block, number)
            output, found = run_block(layout, block, call, hidden, start.autocast)
            sides[number].append(found)
            kept.inputs.put(block + 1, number, output)

    stream.visit(turn, stepped=False)
    found = []
    for number, (run, start) in enumerate(zip(group, starts, strict=True)):
        hidden = kept.inputs.get(last, number, ahead=(last, number + 1))
        found.append(epilogue(layout, run, start.places, hidden, sides[number], _nothing, grad=False))
    return found


def _next(block: int, number: int, count: int) -> tuple[int, int]:
    """The key of the hidden state that is asked for after this one."""
    return (block, number + 1) if number + 1 < count else (block + 1, 0)


def _nothing() -> None:
    """No random numbers are drawn in an evaluation."""
