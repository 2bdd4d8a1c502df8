"""Tensors of which every process of a team holds its own rows: PyTorch's ``DTensor``, as FSDP2 leaves parameters.

FSDP2 gathers a module's parameters before its forward and its backward pass and drops them after. Gradients are not its
business here: what is split is stored, not trained. Rows are dealt as ``torch.chunk`` does it: the last processes may
hold fewer of them, or none.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import RankError
from .telling import reaching

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import UnshardHandle

    from .apart import Apart


def shard(blocks: Iterable[nn.Module], sharded: set[nn.Parameter], mesh: "DeviceMesh") -> None:
    """Leave of the parameters in ``sharded`` (requires_grad False) this process's rows alone, gathered for each of
    ``blocks`` while that runs; all other parameters stay whole, and FSDP2 ignores them. ``mesh``: from ``mesh_of``."""
    from torch.distributed.fsdp import fully_shard  # takes a second to import

    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=set(block.parameters()) - sharded)


class Gathered:
    """Around the turns of ``blocks`` in a walk, which :func:`shard` has split: each is gathered once for all that is
    done in a turn, and the next one begins to come.

    On the way back a block stays whole for one turn longer. Its gradients travel to the processes that step it while
    the next block works, and these write what they step into the gathered block. All processes take the same turns,
    also one that has failed, until the others have heard of that. Blocks that are not shared are left alone.
    """

    stays = True  # until the turn after its own

    def __init__(
        self, blocks: Sequence[nn.Module], before: Sequence["Apart"] = (), behind: Sequence["Apart"] = ()
    ) -> None:
        """``before`` and ``behind``: what is set apart of the model's parts there, or in both."""
        from torch.distributed.fsdp import FSDPModule

        self.before, self.behind, self.last = list(before), list(behind), len(blocks)
        self.blocks: dict[int, FSDPModule] = {n: b for n, b in enumerate(blocks) if isinstance(b, FSDPModule)}
        self._coming: dict[int, UnshardHandle] = {}
        self._lasting: int | None = None  # the block that has had its turn and may yet be stepped

    def begin(self) -> None:
        """From here on FSDP2 does not drop by itself what it has gathered. What comes before the blocks is whole."""
        self._drop_at_once(False)
        self._drop_apart()
        _gather(self.before)

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
        self._drop_apart()

    def visit(self, act: Callable[[int], None], *, stepped: bool) -> None:
        """Call ``act`` with the number of each block, from the first to the last, while it is whole; then with the
        number behind these, for all else."""
        for block in self.blocks:
            self._come(block)
            act(block)
            self._drop(block)
        _gather([*self.before, *self.behind])
        act(self.last)
        self._drop_apart()

    def _drop_apart(self) -> None:
        for one in (*self.before, *self.behind):
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


def _gather(parameters: Iterable["Apart"]) -> None:
    for one in parameters:
        one.gather()


def is_shared(tensor: Tensor) -> bool:
    """Whether the processes hold rows of ``tensor``."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """The rows here, in the memory in which they are stored; ``tensor`` itself if it is not shared."""
    return tensor.detach().to_local() if is_shared(tensor) else tensor


def like(tensor: Tensor, rows: Tensor) -> Tensor:
    """The tensor of which ``rows`` are the ones here, shared by the processes that share ``tensor``."""
    from torch.distributed.tensor import DTensor

    shape = {"shape": tensor.shape, "stride": tensor.stride()}
    return DTensor.from_local(rows, tensor.device_mesh, tensor.placements, run_check=False, **shape)


def shards_of(tensor: Tensor) -> int:
    """Over how many processes the rows of ``tensor`` are split; 1 if it is not shared."""
    return tensor.device_mesh.shape[-1] if is_shared(tensor) else 1


def holders(tensor: Tensor) -> list[list[int]]:
    """For each share of a shared ``tensor``'s rows, in their order, the processes that hold it: one, or one in each
    replica."""
    mesh = tensor.device_mesh.mesh
    return mesh.reshape(-1, mesh.shape[-1]).T.tolist()


def first_holders(tensor: Tensor) -> tuple[tuple[int, int], ...]:
    """For each share of a shared ``tensor``'s rows, in their order, a process that holds it and its bytes."""
    groups, rows = holders(tensor), torch.arange(tensor.shape[0], device="cpu")
    width = tensor.shape[1:].numel() * tensor.dtype.itemsize
    return tuple((ranks[0], len(share(rows, number, len(groups))) * width) for number, ranks in enumerate(groups))


def rows_of(tensor: Tensor, whole: Tensor) -> Tensor:
    """Of ``whole`` the rows that are here of the shared ``tensor``; all, if it is not shared."""
    if not is_shared(tensor):
        return whole
    return share(whole, tensor.device_mesh.get_local_rank(tensor.device_mesh.ndim - 1), shards_of(tensor))


def overlap(tensor: Tensor, first: int, rows: Tensor) -> tuple[int, Tensor]:
    """Of ``rows``, meant for ``tensor`` from its row ``first`` on: where those that are here go, and they."""
    if not is_shared(tensor):
        return first, rows
    here = rows_of(tensor, torch.arange(tensor.shape[0], device="cpu"))
    start, end = (int(here[0]), int(here[-1]) + 1) if len(here) else (0, 0)
    a, b = max(first, start), min(first + rows.shape[0], end)
    return (a - start, rows[a - first : b - first]) if a < b else (0, rows[:0])


def share(whole: Tensor, number: int, count: int) -> Tensor:
    """The rows of ``whole`` in share ``number`` of ``count``: a view, of no rows if there are too few."""
    rows = -(-whole.shape[0] // count)
    return whole[number * rows : (number + 1) * rows]
