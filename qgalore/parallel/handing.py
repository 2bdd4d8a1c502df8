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


def hand_out(handed: Sequence[Handed], rank: int, size: int) -> None:
    """Give every process of the job what it keeps of the tensors ``handed``, which all name in one order.

    What is split goes round in one all-to-all, and what is kept whole is broadcast. This process is ``rank`` of
    ``size``.
    """
    for one in handed:
        if one.rows is None:
            with reaching():
                dist.broadcast(one.whole, src=one.owner)
    split = [(one, _shares(one)) for one in handed if one.rows is not None]
    if not split:
        return
    sent = [_flat(shares[to]) for to in range(size) for one, shares in split if one.owner == rank]
    counts = [sum(shares[to].nbytes for one, shares in split if one.owner == rank) for to in range(size)]
    coming = [[(one, shares[rank]) for one, shares in split if one.owner == source] for source in range(size)]
    expected = [sum(share.nbytes for _, share in group) for group in coming]
    device = handed[0].whole.device
    parcel = torch.cat(sent) if sent else torch.empty(0, dtype=torch.uint8, device=device)
    arrived = torch.empty(sum(expected), dtype=torch.uint8, device=device)
    with reaching():
        dist.all_to_all_single(arrived, parcel, expected, counts)
    place = 0
    for one, share in (pair for group in coming for pair in group):
        _flat(shards.local(one.rows)).copy_(arrived[place : place + share.nbytes])
        place += share.nbytes


def _shares(one: Handed) -> list[Tensor]:
    """For each process, a view of the rows of the whole tensor that it keeps."""
    groups = shards.holders(one.rows)
    number_of = {rank: number for number, ranks in enumerate(groups) for rank in ranks}
    return [shards.share(one.whole, number_of[rank], len(groups)) for rank in range(len(number_of))]


def _flat(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor: a view."""
    return tensor.reshape(-1).view(torch.uint8)
