"""Refresh schedules of one layer. Steps are optimizer steps, counted from 0; all layers get their first basis in 0."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from ...schedule_defaults import THRESHOLDS

# Of the energy schedule.
LOOKS = 4  # in update_proj_gap steps
REFERENCE = 2  # looks after a refresh, whose mean the later ones are held against
WEIGHT = 0.5  # of the newest look in the slow average
FALL = 0.9  # of the reference, under which a new basis is searched for


@dataclass
class Schedule:
    """What all schedules keep. ``first_gap`` replaces the gap once, after the very first basis, so that the layers'
    later refreshes fall on different steps."""

    base_gap: int
    first_gap: int
    gap: int = 0  # the gap in force; starts as base_gap
    max_gap: int = 1 << 30
    next_refresh: int = 0
    refreshes: int = 0
    failures: int = 0

    def __post_init__(self) -> None:
        self.gap = self.gap or self.base_gap

    def due(self, step: int) -> bool:
        """Whether the layer's full gradient is wanted in ``step``."""
        return step >= self.next_refresh

    def wants(self, step: int, energy: Callable[[], float]) -> bool:
        """Whether a due step shall find a new basis; ``energy()`` measures what share of the gradient the present one
        captures."""
        return True

    def record(self, step: int, similarity: float | None) -> None:
        """A refresh happened in ``step``; ``similarity`` to the basis before it, None if there was none to compare."""
        raise NotImplementedError

    def record_failure(self, step: int) -> None:
        """A refresh was due in ``step`` and found no basis: the old one is kept and the gap starts again."""
        self.failures += 1
        self.next_refresh = step + self.gap

    def fixed_refreshes(self, steps: int) -> int:
        """How often a schedule that never stretches its gap would have refreshed in the first ``steps`` steps."""
        if steps <= self.first_gap:
            return min(steps, 1)
        return 2 + (steps - 1 - self.first_gap) // self.base_gap

    def state(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class LazySchedule(Schedule):
    """The lazy schedule of Q-GaLore (arXiv 2407.08296, §3.2).

    A refresh is due when ``step >= next_refresh``. After it, ``gap`` steps pass; when the mean of the last
    ``queue_size`` similarities reaches ``cos_threshold``, the gap is multiplied by ``gamma_proj``, up to ``max_gap``.
    """

    cos_threshold: float = THRESHOLDS["signed_cosine"]
    gamma_proj: float = 2.0
    queue_size: int = 5
    similarities: list[float] = field(default_factory=list)

    def record(self, step: int, similarity: float | None) -> None:
        first = self.refreshes == 0
        self.refreshes += 1
        if similarity is not None:
            self.similarities = [*self.similarities, similarity][-self.queue_size :]
            # Only a full queue can stretch the gap: the mean over it decides, as published.
            full = len(self.similarities) == self.queue_size
            if full and sum(self.similarities) / self.queue_size >= self.cos_threshold:
                self.gap = int(min(self.gap * self.gamma_proj, max(self.max_gap, self.gap)))
        self.next_refresh = step + (self.first_gap if first else self.gap)


@dataclass
class EnergySchedule(Schedule):
    """Refresh when the basis captures less of the gradient than it did: no decomposition is needed to decide.

    Four times in ``base_gap`` steps the layer's full gradient G is looked at, and ρ = ‖PᵀG‖²/‖G‖² taken
    from it, exactly. The mean ρ of the first two looks after a refresh is the reference (the gradient that the basis
    was found from flatters it); when a slow average of the later looks falls under 0.9 of the reference, or
    ``max_gap`` steps have passed, that look's gradient gives the new basis.

    Ours; a look costs one layer's weight gradient, as a refresh does, and nothing is stored for it. (Estimating ‖G‖²
    in every step, from a few random columns G ω, would need a third leaf in every layer, and with k columns a
    gradient of nearly rank one leaves a standard error of √(2/k).)
    """

    first_looks: list[float] = field(default_factory=list)
    average: float = 0.0
    last_refresh: int = 0

    def record_failure(self, step: int) -> None:
        self.failures += 1
        self.next_refresh = step + look_gap(self.base_gap)

    def wants(self, step: int, energy: Callable[[], float]) -> bool:
        if self.refreshes == 0:
            return True
        # Looks come at a fixed pace. The average of the first ones is the reference and the start of the slow average.
        seen = energy()
        self.next_refresh = step + look_gap(self.base_gap)
        if len(self.first_looks) < REFERENCE:
            self.first_looks = [*self.first_looks, seen]
            self.average = fmean(self.first_looks)
        else:
            self.average += WEIGHT * (seen - self.average)
        fallen = len(self.first_looks) == REFERENCE and self.average < FALL * fmean(self.first_looks)
        return fallen or step - self.last_refresh >= self.max_gap

    def record(self, step: int, similarity: float | None) -> None:
        first = self.refreshes == 0
        self.refreshes += 1
        self.first_looks, self.average, self.last_refresh = [], 0.0, step
        self.next_refresh = step + (self.first_gap if first else look_gap(self.base_gap))


def look_gap(gap: int) -> int:
    """Steps between two looks of the energy schedule."""
    return max(1, gap // LOOKS)


def staggered_first_gaps(layers: int, gap: int) -> list[int]:
    """First gaps that spread ``layers`` refreshes evenly over the ``gap`` steps that follow, the last at ``gap``."""
    return [-(-(index + 1) * gap // layers) for index in range(layers)]
