"""Rows that go from the process that has changed a tensor to those that keep them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist

from . import shards
from .telling import reaching


@dataclass(frozen=True)
class Handed:
    """A tensor that process ``owner`` has changed: ``whole`` there, and maybe stale elsewhere. ``rows``: what each
    process keeps of it; None where it is kept whole."""

    whole: Tensor
    rows: Tensor | None
    owner: int


def hand_out(handed: Sequence[Handed], rank: int) -> None:
    """Give every process of the job what it keeps of the tensors ``handed``, which all name in one order.

    What is kept whole is broadcast. Of what is split, an owner gives the processes of its own copy their rows, all in
    one all-to-all, and each of them passes its rows on to those that keep the same ones in other copies. This process
    is ``rank``.
    """
    for one in handed:
        if one.rows is None:
            with reaching():
                dist.broadcast(one.whole, src=one.owner)
    split = [one for one in handed if one.rows is not None]
    if split:
        _hand_out_rows(split, rank)


def _hand_out_rows(split: Sequence[Handed], rank: int) -> None:
    grid = _Grid(split[0].rows, rank)
    for copy in range(len(grid.ranks)):
        theirs = [[one for one in split if one.owner == owner] for owner in grid.ranks[copy]]  # by owner
        mine = [(one, shards.share(one.whole, grid.share, grid.shares)) for group in theirs for one in group]
        if not mine:
            continue
        if copy == grid.copy:
            arrived = _exchanged(theirs, grid)
        else:
            arrived = torch.empty(sum(rows.nbytes for _, rows in mine), dtype=torch.uint8, device=split[0].whole.device)
        if len(grid.ranks) > 1:
            with reaching():
                dist.broadcast(arrived, src=grid.ranks[copy][grid.share], group=grid.mesh.get_group(0))
        place = 0
        for one, rows in mine:
            _flat(shards.local(one.rows)).copy_(arrived[place : place + rows.nbytes])
            place += rows.nbytes


class _Grid:
    """Where this process is among those that share a tensor: share ``share`` of ``shares``, in copy ``copy``.
    ``ranks``: those of each copy, in the order of their shares."""

    def __init__(self, tensor: Tensor, rank: int) -> None:
        self.mesh = tensor.device_mesh
        self.ranks = self.mesh.mesh.reshape(-1, self.mesh.shape[-1]).tolist()
        self.shares = len(self.ranks[0])
        self.copy, self.share = next((r, s) for r, row in enumerate(self.ranks) for s, n in enumerate(row) if n == rank)


def _exchanged(theirs: Sequence[Sequence[Handed]], grid: _Grid) -> Tensor:
    """The bytes of this process's rows of what the owners in its copy have changed, one owner after the other."""
    own = theirs[grid.share]
    parts = [[shards.share(one.whole, share, grid.shares) for one in own] for share in range(grid.shares)]
    counts = [sum(rows.nbytes for rows in part) for part in parts]
    wanted = [sum(shards.share(one.whole, grid.share, grid.shares).nbytes for one in group) for group in theirs]
    device = next(one.whole.device for group in theirs for one in group)
    parcel = [_flat(rows) for part in parts for rows in part] or [torch.empty(0, dtype=torch.uint8, device=device)]
    arrived = torch.empty(sum(wanted), dtype=torch.uint8, device=device)
    with reaching():
        dist.all_to_all_single(
            arrived, torch.cat(parcel), wanted, counts, group=grid.mesh.get_group(grid.mesh.ndim - 1)
        )
    return arrived


def _flat(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor: a view."""
    return tensor.reshape(-1).view(torch.uint8)
