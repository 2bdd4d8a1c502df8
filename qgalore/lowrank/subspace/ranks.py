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
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..inner.checked import Factory
from . import moments, sides

STEP = 8  # columns by which a rank moves: what matrix products of 16-bit numbers like
SLACK = 8  # a rank stays unless it would change by more than a part in this, so that it does not follow the noise
_TRIAL = 8192  # elements from which on bytes of moments are extrapolated: above all thresholds of 8-bit optimizers

Bytes = tuple[int, int]  # (bases and moments, gradient of Δ)


class Adaptive(Protocol):
    """A trained tensor whose rank is free to move. ``module`` has ``rank``, ``mean_rank`` and ``max_rank``."""

    module: Any
    budget: "RankBudget"

    def cost(self, rank: int) -> Bytes:
        """What the layer takes at ``rank``."""
        ...

    def leaves(self) -> list[nn.Parameter]: ...


class RankBudget:
    """What ``tensors`` share: the bytes that they would take together at their ``mean_rank``."""

    def __init__(self, tensors: Iterable[Adaptive], moment_bytes: Callable[[torch.Size], int]) -> None:
        self.tensors, self.moment_bytes = list(tensors), moment_bytes
        for tensor in self.tensors:
            tensor.budget = self
        self.limit = _total(tensor.cost(tensor.module.mean_rank) for tensor in self.tensors)

    def used(self) -> Bytes:
        """Of the limit, now."""
        return _total(tensor.cost(tensor.module.rank) for tensor in self.tensors)

    def fits(self, tensor: Adaptive, *ranks: int) -> int | None:
        """The first of ``ranks`` that ``tensor`` may take, the others being what they are; None if there is none."""
        # What the layer itself takes now counts as room, since its new basis replaces the old one.
        parts = zip(self.limit, self.used(), tensor.cost(tensor.module.rank), strict=True)
        room = [limit - used + own for limit, used, own in parts]
        return next((rank for rank in ranks if all(a <= b for a, b in zip(tensor.cost(rank), room, strict=True))), None)

    def ceiling(self, tensor: Adaptive) -> int:
        """The largest rank that ``tensor`` may take: ``max_rank``, the present one or whole ``STEP`` columns."""
        most, now = tensor.module.max_rank, tensor.module.rank
        return self.fits(tensor, *sorted({most, *range(now // STEP * STEP + STEP, most, STEP)}, reverse=True)) or now


def share(tensors: list[Adaptive], factory: Factory) -> None:
    """Put ``tensors``, attached, under one :class:`RankBudget`."""
    if tensors:
        RankBudget(tensors, measured_bytes(factory, tensors[0].leaves()[0].device))


def measured_bytes(factory: Factory, device: torch.device) -> Callable[[torch.Size], int]:
    """A function (rows, columns) → bytes that an inner optimizer keeps for such a matrix, tried; of many rows, of
    which each whole block adds the same, on the first ones."""

    @cache
    def tried(rows: int, columns: int) -> int:
        leaf = nn.Parameter(torch.zeros(rows, columns, device=device))
        inner = factory([leaf])
        leaf.grad = torch.zeros_like(leaf)
        inner.step()
        # The tables of 8-bit codes are there once for all leaves, whatever their ranks are.
        own = {name: value for name, value in inner.state.get(leaf, {}).items() if not name.startswith("qmap")}
        return sum(value.nbytes for value in own.values() if torch.is_tensor(value))

    def moment_bytes(shape: torch.Size) -> int:
        rows, columns = shape
        # ``unit`` rows fill whole blocks of moments, so that every further ``unit`` of rows adds the same bytes.
        unit = moments.BLOCK // math.gcd(moments.BLOCK, columns)
        few = -(-_TRIAL // (columns * unit)) * unit
        if rows <= few:
            return tried(rows, columns)
        more = (tried(2 * few, columns) - tried(few, columns)) * unit // few
        whole, rest = divmod(rows - few, unit)
        return tried(few + rest, columns) + whole * more

    return moment_bytes


def enough(gradient: Tensor, columns: Tensor, energy: float) -> int:
    """How many of ``columns`` (in, k), the singular vectors of G (out, in) in descending order, keep ``energy`` of
    ‖G‖²; k if they do not, and for an ``energy`` of 1, which rounding must not decide."""
    squares = sides.squared_lengths(gradient, columns)
    total = torch.linalg.vector_norm(gradient, dtype=torch.float32).square()
    needed = 1 + int((squares.cumsum(0) < energy * total).sum())
    return columns.shape[1] if energy == 1 else min(columns.shape[1], needed)


def wanted_rank(
    gradient: Tensor, columns: Tensor, energy: float, now: int, fits: Callable[[Iterable[int]], int | None], first: bool
) -> int:
    """The rank to keep of ``columns`` (in, k), found for G (out, in) at the largest rank that is allowed.

    ``now``: the present rank, which stays if the change would be small, unless this is the ``first`` basis.
    ``fits(ranks)``: the first of them that the budget has room for.
    """
    # Ranks are whole steps, and a small change is not worth new moments.
    ceiling = columns.shape[1]
    wanted = min(ceiling, -(-enough(gradient, columns, energy) // STEP) * STEP)
    if abs(wanted - now) * SLACK <= now and not first:
        return now
    # Small moments, in fp32, may take more than larger ones in 8 bits, so not every rank under the ceiling fits.
    return fits(range(wanted, ceiling, STEP)) or ceiling


def _total(costs: Iterable[Bytes]) -> Bytes:
    first, second = zip(*costs, strict=True)
    return sum(first), sum(second)
