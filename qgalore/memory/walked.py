"""Layer-major steps in a rehearsal: what waits for a walk's second pass, for more micro-batches than are rehearsed."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..step.activations import Activations, Arguments, KeptGraphs, Key

REHEARSED = 2  # micro-batches: the first begins an accumulation, the second adds to it


class OnPaper:
    """Stands for a store of a walk with ``more`` micro-batches than take part.

    Beside the tensor of the last one that takes part (number ``last``) lies another, as large as those of all the
    others together. What waits ``on_host`` is kept as a shape, but for the newest, which is still on the device.
    """

    def __init__(self, last: int, more: int, on_host: bool) -> None:
        self.last, self.more, self.on_host = last, more, on_host
        self._kept: dict[Key, tuple[Tensor, ...]] = {}
        self._away: dict[Key, tuple[torch.Size, torch.dtype]] = {}

    def put(self, block: int, number: int, tensor: Tensor) -> None:
        key = block, number
        if self.on_host:
            self._kept.clear()
            self._away[key] = tensor.shape, tensor.dtype
            self._kept[key] = (tensor,)
            return
        others = tensor.new_empty(self.more, *tensor.shape) if self.more and number == self.last else None
        self._kept[key] = (tensor,) if others is None else (tensor, others)

    def get(self, block: int, number: int, *, drop: bool = True, ahead: Key | None = None) -> Tensor:
        key = block, number
        if key in self._kept:
            tensor = self._kept[key][0]
        else:
            shape, dtype = self._away[key]
            tensor = torch.empty(shape, dtype=dtype, device="meta")
        if drop:
            self._kept.pop(key, None)
            self._away.pop(key, None)
        if self.on_host and ahead in self._away and ahead not in self._kept:
            shape, dtype = self._away[ahead]
            self._kept[ahead] = (torch.empty(shape, dtype=dtype, device="meta"),)
        return tensor

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()
        self._away.clear()


class GraphsOnPaper(KeptGraphs):
    """As :class:`OnPaper`, for the graphs of all blocks. ``live()`` tells the bytes that are there now; what a block of
    the last micro-batch has added since :meth:`begins` is what each of the others would add."""

    def __init__(self, blocks: int, last: int, more: int, live: Callable[[], int]) -> None:
        super().__init__(blocks)
        self.last_number, self.more, self.live, self._before = last, more, live, 0

    def begins(self) -> None:
        """A block is about to run."""
        self._before = self.live()

    def put(self, block: int, number: int, graph: Any) -> None:
        others = None
        if self.more and number == self.last_number:
            added = max(0, self.live() - self._before)
            others = torch.empty(self.more * added, dtype=torch.uint8, device="meta")
        super().put(block, number, (graph, others))

    def get(self, block: int, number: int) -> Any:
        return super().get(block, number)[0]


def rehearsed(micro_batches: int) -> int:
    """How many of a step's micro-batches a rehearsal takes."""
    return min(REHEARSED, micro_batches)


def activations(
    micro_batches: int, blocks: int, *, graphs: bool, on_host: bool, live: Callable[[], int]
) -> Activations:
    """What the walk of so many ``micro_batches`` keeps, of which :func:`rehearsed` take part. ``graphs``: those of all
    blocks are kept, and there is no second pass."""
    part = rehearsed(micro_batches)
    kept = Activations()
    kept.graphs = GraphsOnPaper(blocks if graphs else 0, part - 1, micro_batches - part, live)
    kept.inputs, kept.gradients, arguments = (OnPaper(part - 1, micro_batches - part, on_host) for _ in range(3))
    kept.arguments = Arguments(arguments)
    return kept
