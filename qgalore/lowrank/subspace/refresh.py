"""A refresh: search, decide, compare, adopt. Functions of values; a trained tensor calls them one after the other.

A gradient G (out, in) has two *sides*, in this order: the left one, whose basis (out, r) the decomposition of Gᵀ gives,
and the right one, whose basis (in, r) that of G gives. What belongs to a side with the identity for its basis is None.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ...parallel import ALONE, Team
from . import measures, moments, search
from .policies import DECIDING

Sides = Sequence[Tensor | None]  # left and right: fp32 columns (dim, r), or None for the identity
# What a record tells of a new basis only where there was an old one.
FROM_OLD = ("energy_before", "overlap", "overlap_above_chance", "first_vector", "signed_cosine", "angle_cosines")


@dataclass(frozen=True)
class RefreshOptions:
    """How a basis is found (``method``), when (``policies``), what the moments do (``moments``), and who must find
    the same one (``team``); and how int8 weights are rounded and scaled at a merge (``quant.int8``)."""

    method: str = "randomized"
    policy: str = "overlap"
    moments: str = "rotate"
    power_iterations: int = 2
    seed: int = 0
    team: Team = ALONE
    rounding: str = "stochastic"
    scales: str = "sticky"
    # The share of the gradient's energy that a rank keeps where it is free to move (``ranks``).
    energy: float = 0.9


@dataclass(frozen=True)
class Found:
    """New fp32 columns for each side; and None, or why the decomposition failed and the columns are random."""

    columns: list[Tensor | None]
    failure: str | None = None

    @property
    def rank(self) -> int:
        return next(columns.shape[1] for columns in self.columns if columns is not None)

    def cut(self, rank: int) -> "Found":
        """The first ``rank`` columns."""
        return Found([None if c is None else c[:, :rank].contiguous() for c in self.columns], self.failure)


def find(
    gradient: Tensor, bases: Sequence, old: Sides, rank: int, options: RefreshOptions, generator: torch.Generator
) -> Found:
    """Search: for each side that has one of ``bases`` (``layers.linear.Basis``) its leading ``rank`` singular vectors.

    ``old``: orthonormal columns of the bases so far, from which an iteration may start. A decomposition that fails
    gives random columns.
    """
    found: list[Tensor | None] = []
    failure = None
    for basis, matrix, warm in zip(bases, (gradient.T, gradient), old, strict=True):
        if basis is None:
            found.append(None)
            continue
        # A kernel's basis is U ⊗ I, and only U is searched for.
        matrix = basis.unfold(matrix)
        if warm is not None:
            warm = basis.reduce(warm)
        # The two unfoldings of a kernel have ranks of their own.
        most = min(rank, *matrix.shape)
        try:
            if options.method == "exact":
                columns = search.exact_basis(matrix, most)
            else:
                columns = search.randomized_basis(matrix, most, generator, warm, options.power_iterations)
            if not torch.isfinite(columns).all():
                raise search.LinAlgError("the decomposition returned values that are not finite")
        # A decomposition may fail on some gradient of a long run. Random columns let the run go on, and are recorded.
        except search.LinAlgError as error:
            failure = str(error).splitlines()[0]
            columns = search.random_basis(basis.dim, most, generator, gradient.device)
        found.append(basis.expand(columns).contiguous())
    return Found(found, failure)


def energy(gradient: Tensor, stored: Sides) -> float:
    """Decide: the share of the gradient that the stored bases capture, the mean of the sides, from which a schedule may
    tell whether a search is worth its cost. The bases' rounding, the same at every look, is not taken out."""
    pairs = zip(stored, (gradient.T, gradient), strict=True)
    found = [search.captured_energy(matrix, basis) for basis, matrix in pairs if basis is not None]
    return sum(found) / len(found)


def compare(gradient: Tensor, stored: Sides, old: Sides, new: Sides, policy: str) -> dict[str, Any]:
    """Compare: energies and similarities of orthonormal columns, averaged over the sides that have a basis.

    ``old`` is ``stored`` made orthonormal, which may mirror a column; signs are therefore those of ``stored``.
    ``similarity`` is the one by which ``policy`` decides. What needs an old basis is None without one.
    """
    rows = []
    for matrix, kept, before, after in zip((gradient.T, gradient), stored, old, new, strict=True):
        if after is None:
            continue
        row: dict[str, Any] = dict.fromkeys(FROM_OLD)
        row["energy"], row["spectrum"] = measures.captured(matrix, after)
        if before is not None and kept is not None:
            row["energy_before"] = search.captured_energy(matrix, before)
            row["overlap"] = search.overlap(before, after)
            rank = max(after.shape[1], before.shape[1])
            row["overlap_above_chance"] = search.above_chance(row["overlap"], rank, after.shape[0])
            row["signed_cosine"] = search.first_vector_cosine(kept, after)
            row["first_vector"] = abs(row["signed_cosine"])
            row["angle_cosines"] = measures.angle_cosines(before, after)
        rows.append(row)
    mean = measures.mean_of_sides(rows)
    return mean | {"similarity": mean[DECIDING[policy]]}


def orthonormal(stored: Sides) -> list[Tensor | None]:
    """The stored bases made orthonormal, which their rounding has left them only nearly."""
    return [None if columns is None else search.orthonormal(columns) for columns in stored]


def adopt(bases: Sequence, columns: Sides) -> None:
    """Adopt: store new ``columns`` in the ``bases`` that they were found for."""
    for basis, new in zip(bases, columns, strict=True):
        if basis is not None:
            basis.assign(new)


def changes_of_basis(old: Sides, new: Sides) -> list[Tensor | None]:
    """For each side C = P_newᵀ P_old, of the columns as they are stored; None for the identity."""
    return [moments.change_of_basis(a, b) for a, b in zip(old, new, strict=True)]


def bring_moments(inners: Iterable[tuple[Optimizer, Tensor]], old: Sides, new: Sides, policy: str) -> None:
    """Bring the moments of (inner optimizer, leaf) pairs into the coordinates of the new bases, as ``policy`` says."""
    if policy == "keep":
        return
    if policy == "rotate":
        changes = changes_of_basis(old, new)
        for inner, leaf in inners:
            moments.rotate(inner, leaf, *changes)
        return
    for inner, leaf in inners:
        moments.reset(inner, leaf)
