"""The trained tensor of a layer whose rank is free to move (see ``subspace.ranks``)."""

from typing import Any

import torch
from torch import Tensor

from ...quant import basis
from ..inner.checked import Factory
from ..subspace import moments, ranks, refresh
from ..subspace.refresh import Found, Sides
from .base import Part, Scratch
from .projected import ProjectedTensor


class AdaptiveTensor(ProjectedTensor):
    """A :class:`LowRankLinear`'s weight with a rank of its own. Its parts, and the scratch memory, are those of
    ``max_rank``."""

    adaptive = True
    budget: ranks.RankBudget  # set by :func:`ranks.share`

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.shape = self.module.delta_shape(self.max_rank)

    @property
    def max_rank(self) -> int:
        """The rank up to which it may grow."""
        most = self.module.max_rank
        assert most is not None, f"the rank of {self.name} is fixed"
        return most

    def attach(self, scratch: Scratch, factory: Factory, ranges: list[tuple[int, int]]) -> None:
        super().attach(scratch, factory, ranges)
        for part in self.parts:
            _blank(part, self.part_shape(part, self.rank))

    def part_shape(self, part: Part, rank: int) -> torch.Size:
        rows, columns = self.module.delta_shape(rank)
        return torch.Size((part.leaf.shape[0] if self.by_rows else rows, columns))

    def cost(self, rank: int) -> ranks.Bytes:
        total = 0
        for side in self.bases:
            if side is not None:
                stored = basis.empty(rank, side.dim, side.fmt, "meta")
                total += sum(tensor.nbytes for tensor in stored if tensor is not None)
        total += sum(self.budget.moment_bytes(self.part_shape(part, rank)) for part in self.parts)
        return total, self.module.delta_shape(rank).numel() * self.module.delta.element_size()

    def rank_to_find(self) -> int:
        return self.budget.ceiling(self)

    def settle_rank(self, gradient: Tensor, found: Found, old: Sides) -> Found:
        """Cut the columns, found at the ceiling, to the rank that is enough."""

        def decide() -> int:
            if found.failure is not None:
                return self.rank
            pairs = zip(found.columns, (gradient.T, gradient), strict=True)
            columns, matrix = next((columns, matrix) for columns, matrix in pairs if columns is not None)
            first = all(side is None for side in old)
            energy, now = self.options.energy, self.rank
            return ranks.wanted_rank(matrix, columns, energy, now, lambda some: self.budget.fits(self, *some), first)

        return found.cut(self.deciding.of_first(f"the rank of {self.name}", decide))

    def adopt(self, found: Found, stored: Sides, first: bool) -> None:
        if found.rank == self.module.rank:
            super().adopt(found, stored, first)
            return
        self.module.set_rank(found.rank)
        refresh.adopt(self.bases, found.columns)
        changes = refresh.changes_of_basis(stored, self.module.columns())
        for part in self.parts:
            carried = self.options.moments == "rotate" and not first
            _remake(part, self.part_shape(part, found.rank), changes if carried else None)

    def take_rank(self, rank: int) -> None:
        """Take the ``rank`` that the owner has found; the bases, which are then unset, are yet to come."""
        if rank != self.module.rank:
            self.module.set_rank(rank)
            for part in self.parts:
                _remake(part, self.part_shape(part, rank), None)

    def progress(self) -> dict[str, Any]:
        return super().progress() | {"rank": self.module.rank}

    def restore(self, progress: dict[str, Any]) -> None:
        super().restore(progress)
        # The model's own tensors are yet to come, and need the rank that the checkpoint has.
        if progress["rank"] != self.module.rank:
            self.module.set_rank(progress["rank"])
        for part in self.parts:
            _remake(part, self.part_shape(part, self.rank), None)

    def fill(self) -> None:
        """Take ``max_rank``, on the meta device, for the plan of a step in which each layer in turn may be as large."""
        rank = self.max_rank
        self.module.set_rank(rank)
        for part in self.parts:
            shape = self.part_shape(part, rank)
            _remake(part, shape, None)
            if not self.elsewhere:
                part.step(torch.zeros(shape, device=part.leaf.device), 0.0)


def _blank(part: Part, shape: torch.Size) -> None:
    """Give the leaf a new shape, without memory; stepping finds it some."""
    part.leaf.data = part.leaf.new_zeros(()).expand(shape)


def _remake(part: Part, shape: torch.Size, changes: list[Tensor | None] | None) -> None:
    """Give a part's leaf a new shape, and its moments with it: turned by ``changes``, or forgotten if those are None.

    A step of nothing lets the optimizer make its state for the new size in its own format (small ones are in fp32).
    """
    old = part.state()
    moments.reset(part.inner, part.leaf)
    if old and changes is not None:
        part.leaf.data = part.leaf.new_zeros(shape)
        part.leaf.grad = torch.zeros_like(part.leaf)
        part.inner.step()
        part.leaf.grad = None
    _blank(part, shape)
    if old and changes is not None:
        moments.carry(old, part.inner.state[part.leaf], *changes)
