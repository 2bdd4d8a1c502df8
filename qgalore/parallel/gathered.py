"""The turns of blocks that FSDP2 has split, and of what is set apart outside of them: whole while they are used."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from torch import nn

from ..errors import RankError
from .apart import Apart
from .telling import reaching

if TYPE_CHECKING:
    from torch.distributed.fsdp import UnshardHandle


class Gathered:
    """Around the turns of ``blocks`` in a walk, which :func:`.shards.shard` has split: each is gathered once for all
    that is done in a turn, and the next one begins to come.

    On the way back a block stays whole for one turn longer. Its gradients travel to the processes that step it while
    the next block works, and these write what they step into the gathered block. All processes take the same turns,
    also one that has failed, until the others have heard of that. Blocks that are not shared are left alone.
    """

    stays = True  # until the turn after its own

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        before: Sequence[Apart] = (),
        behind: Sequence[Apart] = (),
        within: Sequence[Apart] = (),
    ) -> None:
        """``before`` and ``behind``: what is set apart of the model's parts there, or in both. ``within``: what blocks
        use besides their own, which is whole for the whole walk: within a turn a process may have failed, and then
        gathers nothing."""
        from torch.distributed.fsdp import FSDPModule

        self.before, self.behind, self.within, self.last = list(before), list(behind), list(within), len(blocks)
        self.blocks: dict[int, FSDPModule] = {n: b for n, b in enumerate(blocks) if isinstance(b, FSDPModule)}
        self._coming: dict[int, UnshardHandle] = {}
        self._lasting: int | None = None  # the block that has had its turn and may yet be stepped

    def begin(self) -> None:
        """From here on FSDP2 does not drop by itself what it has gathered. What comes before the blocks is whole."""
        self._drop_at_once(False)
        self._drop_apart(self.within)
        _gather([*self.before, *self.within])

    def enter(self, block: int, backward: bool) -> None:
        """``block`` is whole now in every process."""
        if block == 0 and not backward:
            self._drop_apart()
        if not 0 <= block < self.last:
            _gather(self.before if backward else self.behind)
            return
        self._come(block)
        ahead = block - 1 if backward else block + 1
        if ahead in self.blocks:
            self._begin(ahead)

    def leave(self, block: int, stepped: bool) -> None:
        """Of ``block`` only the rows here are left or, on the way back, of the block before it."""
        before, self._lasting = (self._lasting, block) if stepped else (block, None)
        self._drop(before)
        if stepped and before is None:  # what is behind the blocks has had its step
            self._drop_apart()

    def end(self, whole: bool) -> None:
        """Drop also what was gathered in vain: all processes have begun it."""
        self._drop_at_once(True)
        self._lasting = None
        for handle in self._coming.values():
            with suppress(RankError), reaching():
                handle.wait()
        self._coming.clear()
        for block in self.blocks.values():
            block.reshard()
        self._drop_apart(self.within)

    def visit(self, act: Callable[[int], None]) -> None:
        """Call ``act`` with the number of each block, from the first to the last, while it is whole; then with the
        number behind these, for all else."""
        for block in self.blocks:
            self._come(block)
            act(block)
            self._drop(block)
        _gather([*self.before, *self.behind, *self.within])
        act(self.last)
        self._drop_apart(self.within)

    def _drop_apart(self, within: Iterable[Apart] = ()) -> None:
        for one in (*self.before, *self.behind, *within):
            one.drop()

    def _come(self, block: int) -> None:
        if block in self.blocks:
            self._begin(block)
            with reaching():
                self._coming.pop(block).wait()

    def _drop(self, block: int | None) -> None:
        if block in self.blocks:
            self.blocks[block].reshard()

    def _begin(self, block: int) -> None:
        if block not in self._coming:
            with reaching():
                handle = self.blocks[block].unshard(async_op=True)
            assert handle is not None, "a gathering is waited for"
            self._coming[block] = handle

    def _drop_at_once(self, yes: bool) -> None:
        """Whether FSDP2 drops what it has gathered after each pass through a block."""
        for block in self.blocks.values():
            block.set_reshard_after_forward(yes, recurse=False)
            block.set_reshard_after_backward(yes, recurse=False)


def _gather(parameters: Iterable[Apart]) -> None:
    for one in parameters:
        one.gather()
