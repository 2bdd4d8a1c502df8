"""Layer-major steps in a rehearsal: what waits for a walk's second pass, for more micro-batches than are rehearsed."""

import torch
from torch import Tensor

from ..step.activations import Activations, Arguments, Key

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


def rehearsed(micro_batches: int, graphs: bool) -> int:
    """How many of a step's micro-batches a rehearsal takes: all whose graphs are kept, which no shape stands for."""
    return micro_batches if graphs else min(REHEARSED, micro_batches)


def activations(micro_batches: int, blocks: int, *, graphs: bool, on_host: bool) -> Activations:
    """What the walk of so many ``micro_batches`` keeps, of which :func:`rehearsed` take part."""
    part = rehearsed(micro_batches, graphs)
    kept = Activations(graphs_of_last=blocks if graphs else 0)
    kept.inputs, kept.gradients, arguments = (OnPaper(part - 1, micro_batches - part, on_host) for _ in range(3))
    kept.arguments = Arguments(arguments)
    return kept
