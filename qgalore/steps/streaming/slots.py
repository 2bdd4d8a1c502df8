"""Device memory for a few records, and which block is in it."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .copies import Moment


@dataclass
class Slot:
    """``block``: whose record is here or on its way; None if nobody's. ``groups``: the parts of the record that are.
    ``arrivals``: when they have come. ``free``: when the memory may be written over."""

    memory: Tensor
    block: int | None = None
    groups: set[str] = field(default_factory=set)
    arrivals: list[Moment] = field(default_factory=list)
    free: list[Moment] = field(default_factory=list)

    def clear(self) -> None:
        """Forget the block; what is still copied from here must be waited for all the same."""
        self.block, self.groups, self.arrivals = None, set(), []

    def views(self) -> int:
        """How many objects, this one included, hold on to the memory."""
        return torch._C._storage_Use_Count(self.memory.untyped_storage()._cdata)


class Slots:
    """``count`` buffers of ``nbytes`` each on ``device``."""

    def __init__(self, count: int, nbytes: int, device: torch.device) -> None:
        self.all = [Slot(torch.empty(nbytes, dtype=torch.uint8, device=device)) for _ in range(count)]
        self.idle = self.all[0].views()  # what the count is when no tensor lies in a slot

    def of(self, block: int) -> Slot | None:
        """The slot of ``block``; None if it has none."""
        return next((slot for slot in self.all if slot.block == block), None)

    def give(self, block: int, current: int | None) -> Slot:
        """A slot for ``block``: an empty one, or the one whose block will be needed last. That is the farthest away,
        as blocks are visited in order, up and down. The ``current`` block keeps its own."""
        slot = max(
            (slot for slot in self.all if slot.block is None or slot.block != current),
            key=lambda slot: float("inf") if slot.block is None else abs(slot.block - block),
        )
        slot.clear()
        slot.block = block
        return slot

    def clear(self) -> None:
        """Forget all blocks."""
        for slot in self.all:
            slot.clear()
