"""Ranks that follow the gradient: for each layer the smallest that keeps a given share of its energy.

Decided at a refresh, from the spectrum that the new basis has found anyway: with σᵢ the lengths of the columns of G P,
r is the first with σ₁² + … + σᵣ² ≥ energy · ‖G‖², rounded up to whole ``STEP`` columns. Bases, moments and Δ's gradient
are made anew with that rank, so what a layer does not need is free.

All layers share a budget: together they take no more than all of them would at their ``mean_rank``, neither in bases
and moments nor in gradients of Δ. A layer may grow, up to its ``max_rank``, into what the others have left free.

Ours; GaLore and Q-GaLore (arXiv 2403.03507, 2407.08296) keep one rank for all layers and all of training.
"""

import math
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ...quant import basis
from ..inner.checked import Factory
from ..tensors.projected import LowRankSlot, Part, Scratch
from . import moments, sides

STEP = 8  # columns by which a rank moves: what matrix products of 16-bit numbers like
SLACK = 8  # a rank stays unless it would change by more than a part in this, so that it does not follow the noise
_TRIAL = 8192  # elements from which on bytes of moments are extrapolated: above all thresholds of 8-bit optimizers

Bytes = tuple[int, int]  # (bases and moments, gradient of Δ)


class AutoRankSlot(LowRankSlot):
    """The slot of a layer whose rank is free to move. Its parts, and the scratch memory, are those of ``max_rank``."""

    budget: "RankBudget"  # set by :func:`share`

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.shape = self.module.delta_shape(self.module.max_rank)

    def attach(self, scratch: Scratch, factory: Factory, limit: int) -> None:
        super().attach(scratch, factory, limit)
        for part in self.parts:
            _blank(part, self.part_shape(part, self.module.rank))

    def part_shape(self, part: Part, rank: int) -> torch.Size:
        rows, columns = self.module.delta_shape(rank)
        return torch.Size((part.leaf.shape[0] if self.by_rows else rows, columns))

    def cost(self, rank: int) -> Bytes:
        """What the layer takes at ``rank``."""
        total = 0
        for side in (self.module.left, self.module.right):
            if side is not None:
                stored = basis.empty(rank, side.dim, side.fmt, "meta")
                total += sum(tensor.nbytes for tensor in stored if tensor is not None)
        total += sum(self.budget.moment_bytes(self.part_shape(part, rank)) for part in self.parts)
        return total, self.module.delta_shape(rank).numel() * self.module.delta.element_size()

    def rank_to_find(self) -> int:
        return self.budget.ceiling(self)

    def _find(self, gradient: Tensor, old, generator: torch.Generator) -> tuple[list[Tensor | None], str | None]:
        """As for a fixed rank, at the ceiling; then cut to the rank that is enough."""
        found, failure = super()._find(gradient, old, generator)
        rank = self.deciding.of_first(
            f"the rank of {self.name}",
            lambda: self.module.rank if failure is not None else self._decide(gradient, found, old),
        )
        return [None if columns is None else columns[:, :rank].contiguous() for columns in found], failure

    def _decide(self, gradient: Tensor, found, old) -> int:
        pairs = zip(found, (gradient.T, gradient), strict=True)
        matrix, columns = next((matrix, columns) for columns, matrix in pairs if columns is not None)
        ceiling, now = columns.shape[1], self.module.rank
        wanted = min(ceiling, -(-enough(matrix, columns, self.options.energy) // STEP) * STEP)
        if abs(wanted - now) * SLACK <= now and any(side is not None for side in old):
            return now
        # small moments, in fp32, may take more than larger ones in 8 bits: not every rank under the ceiling fits
        return self.budget.fits(self, *range(wanted, ceiling, STEP)) or ceiling

    def _adopt(self, found, old, first: bool) -> None:
        rank = next(columns.shape[1] for columns in found if columns is not None)
        if rank == self.module.rank:
            super()._adopt(found, old, first)
            return
        self.module.set_rank(rank)
        for side, columns in zip((self.module.left, self.module.right), found, strict=True):
            if side is not None:
                side.assign(columns)
        new = self.module.columns()
        changes = [moments.change_of_basis(a, b) for a, b in zip(old, new, strict=True)]
        for part in self.parts:
            carried = self.options.moments == "rotate" and not first
            _remake(part, self.part_shape(part, rank), changes if carried else None)

    def refresh(self, step: int) -> dict[str, Any] | None:
        row = super().refresh(step)
        if row is not None:
            row["rank"] = self.module.rank
        return row

    def progress(self) -> dict[str, Any]:
        return super().progress() | {"rank": self.module.rank}

    def restore(self, progress: dict[str, Any]) -> None:
        super().restore(progress)
        if progress["rank"] != self.module.rank:  # the model's own tensors are yet to come
            self.module.set_rank(progress["rank"])
        for part in self.parts:
            _remake(part, self.part_shape(part, self.module.rank), None)


class RankBudget:
    """What ``slots`` share: the bytes that they would take together at their ``mean_rank``."""

    def __init__(self, slots: Iterable[AutoRankSlot], moment_bytes: Callable[[torch.Size], int]) -> None:
        self.slots, self.moment_bytes = list(slots), moment_bytes
        for slot in self.slots:
            slot.budget = self
        self.limit = _total(slot.cost(slot.module.mean_rank) for slot in self.slots)

    def used(self) -> Bytes:
        """Of the limit, now."""
        return _total(slot.cost(slot.module.rank) for slot in self.slots)

    def fits(self, slot: AutoRankSlot, *ranks: int) -> int | None:
        """The first of ``ranks`` that ``slot`` may take, the others being what they are; None if there is none."""
        parts = zip(self.limit, self.used(), slot.cost(slot.module.rank), strict=True)
        room = [limit - used + own for limit, used, own in parts]
        return next((rank for rank in ranks if all(a <= b for a, b in zip(slot.cost(rank), room, strict=True))), None)

    def ceiling(self, slot: AutoRankSlot) -> int:
        """The largest rank that ``slot`` may take: ``max_rank``, the present one or whole ``STEP`` columns."""
        most, now = slot.module.max_rank, slot.module.rank
        return self.fits(slot, *sorted({most, *range(now // STEP * STEP + STEP, most, STEP)}, reverse=True)) or now


def share(slots: list[AutoRankSlot], factory: Factory) -> None:
    """Put ``slots``, attached, under one :class:`RankBudget`."""
    if slots:
        RankBudget(slots, measured_bytes(factory, slots[0].leaves()[0].device))


def measured_bytes(factory: Factory, device: torch.device) -> Callable[[torch.Size], int]:
    """A function (rows, columns) → bytes that an inner optimizer keeps for such a matrix, tried; of many rows, of
    which each whole block adds the same, on the first ones."""

    @cache
    def tried(rows: int, columns: int) -> int:
        leaf = nn.Parameter(torch.zeros(rows, columns, device=device))
        inner = factory([leaf])
        leaf.grad = torch.zeros_like(leaf)
        inner.step()
        return sum(value.nbytes for value in inner.state.get(leaf, {}).values() if torch.is_tensor(value))

    def moment_bytes(shape: torch.Size) -> int:
        rows, columns = shape
        unit = moments.BLOCK // math.gcd(moments.BLOCK, columns)
        few = -(-_TRIAL // (columns * unit)) * unit
        if rows <= few:
            return tried(rows, columns)
        more = (tried(2 * few, columns) - tried(few, columns)) * unit // few  # of ``unit`` rows, which are whole blocks
        whole, rest = divmod(rows - few, unit)
        return tried(few + rest, columns) + whole * more

    return moment_bytes


def enough(gradient: Tensor, columns: Tensor, energy: float) -> int:
    """How many of ``columns`` (in, k), the singular vectors of G (out, in) in descending order, keep ``energy`` of
    ‖G‖²; k if they do not, and for an ``energy`` of 1, which rounding must not decide."""
    squares = sum((tile @ columns).square_().sum(dim=0) for _, _, tile in sides.fp32_tiles(gradient))
    total = torch.linalg.vector_norm(gradient, dtype=torch.float32).square()
    needed = 1 + int((squares.cumsum(0) < energy * total).sum())
    return columns.shape[1] if energy == 1 else min(columns.shape[1], needed)


def at_ceiling(slot: Any, work: Callable[[], None]) -> Callable[[], None]:
    """``work`` for the memory plan: with ``slot`` remade at its ``max_rank``, beside what it is now; of a fixed rank,
    ``work`` itself."""

    def wrapped() -> None:
        module = slot.module
        rank, gradient = module.rank, module.delta.grad
        if rank == module.max_rank and gradient is not None:  # a step, which makes nothing anew
            work()
            return
        present = [(side, side.codes, side.scale) for side in (module.left, module.right) if side is not None]
        states = [part.state() for part in slot.parts]
        _resize_on_paper(slot, module.max_rank)
        if gradient is not None:
            module.delta.grad = torch.empty(slot.shape, dtype=gradient.dtype, device=gradient.device)
        work()
        module.set_rank(rank)
        for side, codes, scale in present:
            side.codes, side.scale = codes, scale
        for part, state in zip(slot.parts, states, strict=True):
            _blank(part, slot.part_shape(part, rank))
            part.inner.state[part.leaf] = state
        module.delta.grad = gradient

    return wrapped if isinstance(slot, AutoRankSlot) else work


def _resize_on_paper(slot: AutoRankSlot, rank: int) -> None:
    slot.module.set_rank(rank)
    for part in slot.parts:
        shape = slot.part_shape(part, rank)
        _remake(part, shape, None)
        part.step(torch.zeros(shape, device=part.leaf.device), 0.0)


def fill(slots: Iterable[Any]) -> None:
    """Give every layer its ``max_rank``, for the plan of a step in which each of them in turn may be as large."""
    for slot in slots:
        if isinstance(slot, AutoRankSlot):
            _resize_on_paper(slot, slot.module.max_rank)


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


def _total(costs: Iterable[Bytes]) -> Bytes:
    first, second = zip(*costs, strict=True)
    return sum(first), sum(second)
