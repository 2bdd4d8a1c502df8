"""The lazy per-layer refresh schedule of Q-GaLore (arXiv 2407.08296, §3.2)."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class LazySchedule:
    """When one layer looks for a new subspace. Steps are optimizer steps, counted from 0.

    A refresh is due when ``step >= next_refresh``. After it, ``gap`` steps pass; when the mean of the last
    ``queue_size`` similarities reaches ``cos_threshold``, the gap is multiplied by ``gamma_proj``, up to ``max_gap``.
    ``first_gap`` replaces the gap once, after the very first basis, so that the layers' later refreshes fall on
    different steps (all layers get their first basis in step 0).
    """

    base_gap: int
    first_gap: int
    gap: int = 0  # the gap in force; starts as base_gap
    cos_threshold: float = 0.4
    gamma_proj: float = 2.0
    queue_size: int = 5
    max_gap: int = 1 << 30
    next_refresh: int = 0
    refreshes: int = 0
    failures: int = 0
    similarities: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.gap = self.gap or self.base_gap

    def due(self, step: int) -> bool:
        return step >= self.next_refresh

    def record(self, step: int, similarity: float | None) -> None:
        """A refresh happened in ``step``; ``similarity`` to the basis before it, None if there was none to compare."""
        first = self.refreshes == 0
        self.refreshes += 1
        if similarity is not None:
            self.similarities = [*self.similarities, similarity][-self.queue_size :]
            full = len(self.similarities) == self.queue_size
            if full and sum(self.similarities) / self.queue_size >= self.cos_threshold:
                self.gap = int(min(self.gap * self.gamma_proj, max(self.max_gap, self.gap)))
        self.next_refresh = step + (self.first_gap if first else self.gap)

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


def staggered_first_gaps(layers: int, gap: int) -> list[int]:
    """First gaps that spread ``layers`` refreshes evenly over the ``gap`` steps that follow, the last at ``gap``."""
    return [-(-(index + 1) * gap // layers) for index in range(layers)]
