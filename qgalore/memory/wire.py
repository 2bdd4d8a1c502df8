"""Between which cards the bytes of a step travel: inside a machine, or from one machine to another.

Sums, broadcasts and gathering go round a ring of their processes, as NCCL sends large tensors. What is handed out goes
from each process to each other one. All figures are of the mean card: owners differ in what they send.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ..lowrank.tensors.base import TrainedTensor

HANDED, PASSED = "hand out rows", "pass rows on"


@dataclass(frozen=True)
class Cards:
    """``replicas`` copies of the blocks, each split over ``shards`` cards, ``per_machine`` of which share a machine.
    Card ``n`` is in machine ``n // per_machine`` and has share ``n % shards`` of its copy, as torchrun numbers them."""

    replicas: int
    shards: int
    per_machine: int

    @property
    def size(self) -> int:
        return self.replicas * self.shards

    @property
    def machines(self) -> int:
        return -(-self.size // self.per_machine)

    def parted(self, one: int, other: int) -> bool:
        return one // self.per_machine != other // self.per_machine

    def across_ring(self, cards: range) -> float:
        """The share of the steps round a ring of ``cards`` that lead to another machine."""
        return sum(self.parted(n, cards[(k + 1) % len(cards)]) for k, n in enumerate(cards)) / len(cards)

    def copies(self) -> Iterator[range]:
        return (range(first, first + self.shards) for first in range(0, self.size, self.shards))

    def across_copies(self) -> float:
        """:meth:`across_ring` of the cards of a copy, on average."""
        return sum(map(self.across_ring, self.copies())) / self.replicas

    def across_pairs(self) -> float:
        """The share of all pairs of cards of one copy that are in different machines, on average over the copies."""
        pairs = self.shards * (self.shards - 1)
        if not pairs:
            return 0.0
        inside = 0
        for copy in self.copies():
            counts = Counter(n // self.per_machine for n in copy)
            inside += sum(count * (count - 1) for count in counts.values())
        return 1.0 - inside / (pairs * self.replicas)

    def across_shares(self) -> float:
        """:meth:`across_ring` of the cards that have the same share in each copy, on average."""
        shares = (range(share, self.size, self.shards) for share in range(self.shards))
        return sum(map(self.across_ring, shares)) / self.shards


@dataclass(frozen=True)
class Sent:
    """Bytes that a card sends, ``inside`` its machine and ``between`` machines."""

    inside: float
    between: float

    @property
    def total(self) -> float:
        return self.inside + self.between


def sent(collective: str, size: float, cards: Cards) -> Sent:
    """What the mean card sends in a step for ``size`` bytes of ``collective``, whose first word says what is done with
    them. All-reduce: each byte goes round twice. Gather: those of a copy go round its cards. Hand: an owner gives each
    other card of its copy its share. Pass: such a share goes round the cards that keep it in other copies."""
    kind = collective.split()[0]
    all_but_one = (cards.size - 1) / cards.size
    if kind == "gather":
        whole, across = size * (cards.shards - 1) / cards.shards, cards.across_copies()
    elif kind == "hand":
        whole, across = size * (cards.shards - 1) / cards.shards / cards.size, cards.across_pairs()
    elif kind == "pass":
        whole, across = size / cards.shards * (cards.replicas - 1) / cards.replicas, cards.across_shares()
    else:
        rounds = 2 if kind == "all-reduce" else 1
        whole, across = rounds * size * all_but_one, cards.across_ring(range(cards.size))
    return Sent(whole * (1.0 - across), whole * across)


def all_sent(payload: Mapping[str, float], cards: Cards) -> dict[str, Sent]:
    """:func:`sent` for each collective of a ``payload`` (``traffic.payload``). What owners hand out is passed on in a
    mesh of several copies."""
    sizes = dict(payload)
    if HANDED in sizes and cards.replicas > 1:
        sizes[PASSED] = sizes[HANDED]
    return {name: sent(name, size, cards) for name, size in sizes.items()}


def busiest(blocks: Sequence[nn.Module], tensors: Sequence[TrainedTensor], cards: int) -> float:
    """How many times as much as the mean card the busiest owner hands out, over all ``blocks`` and over the matrices
    outside of them one by one. A block's largest matrix has one owner, and with few cards each owns an even part."""
    place = {id(parameter): number for number, block in enumerate(blocks) for parameter in block.parameters()}
    parts: dict[int | str, list[int]] = {}
    for tensor in (tensor for tensor in tensors if tensor.group != "vector"):
        parts.setdefault(place.get(id(tensor.leaves()[0]), tensor.name), []).append(tensor.stored.nbytes)
    whole = sum(map(sum, parts.values()))
    return sum(max(cards * max(part), sum(part)) for part in parts.values()) / whole if whole else 1.0
