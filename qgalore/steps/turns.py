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
    with the number of each block that has left, from the first to the last, while it is on the device. It goes back
    changed if it ``stepped`` there.
    """

    stays: bool

    def begin(self) -> None: ...

    def enter(self, block: int, backward: bool) -> None: ...

    def leave(self, block: int, stepped: bool) -> None: ...

    def end(self, whole: bool) -> None: ...

    def visit(self, act: Callable[[int], None], *, stepped: bool) -> None: ...


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

    def visit(self, act: Callable[[int], None], *, stepped: bool) -> None:
        """Nothing: no block has left."""


def gathered(layout: Layout) -> Gathered:
    """The turns of a model that processes split, or hold copies of."""
    kept = {id(p): getattr(p, apart.KEPT) for p in layout.outside if hasattr(p, apart.KEPT)}
    behind = [kept[key] for key in kept if key in layout.behind]
    # What blocks alone use, by calling what has it, must be dropped too once it has changed.
    before = [kept[key] for key in kept if key in layout.before or key not in layout.behind]
    return Gathered(list(layout.blocks), before, behind)
