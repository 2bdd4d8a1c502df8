"""What happens around a block's turn in a walk: its weights may have to come from elsewhere, and to go back."""

from collections.abc import Callable
from typing import Protocol

from ..parallel import apart
from ..parallel.gathered import Gathered
from .blocks import Layout


class Turns(Protocol):
    """Called by a walk, always in this order; see :func:`walk.walk`.

    ``begin`` before anything runs. ``enter`` before the first micro-batch goes through a block, in either direction;
    also, with the number behind the last block, before what follows the blocks, and with −1 before the way back through
    what comes before them.
    ``leave`` when the last one has; ``stepped`` says that this was the backward direction, and that the block's
    tensors have had their step in between. ``end`` when the step is over; ``whole`` is False if an error broke it off,
    maybe in the middle of a turn.

    ``stays``: whether a block's trained tensors can step after its turn too. ``visit``, after a walk, calls ``act``
    with the number of each block that has left, from the first to the last, while it is on the device and may step.
    """

    stays: bool

    def begin(self) -> None: ...

    def enter(self, block: int, backward: bool) -> None: ...

    def leave(self, block: int, stepped: bool) -> None: ...

    def end(self, whole: bool) -> None: ...

    def visit(self, act: Callable[[int], None]) -> None: ...


class AlwaysThere:
    """Nothing has to be done: all blocks stay on the device."""

    stays = True

    def begin(self) -> None:
        """Nothing."""

    def enter(self, block: int, backward: bool) -> None:
        """Nothing."""

    def leave(self, block: int, stepped: bool) -> None:
        """Nothing."""

    def end(self, whole: bool) -> None:
        """Nothing."""

    def visit(self, act: Callable[[int], None]) -> None:
        """Nothing: no block has left."""


def gathered(layout: Layout) -> Gathered:
    """The turns of a model that processes split, or hold copies of."""
    kept = [parameter for parameter in layout.outside if hasattr(parameter, apart.KEPT)]
    ends, both = layout.before | layout.behind, layout.before & layout.behind
    # What is in neither end is in blocks, and so is what has several parts without being in both ends.
    within = {id(p) for p in kept if id(p) not in ends or (id(p) in layout.late and id(p) not in both)}
    places = (layout.before - within, layout.behind - within, within)
    return Gathered(list(layout.blocks), *([getattr(p, apart.KEPT) for p in kept if id(p) in part] for part in places))
