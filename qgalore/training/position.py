"""Where a run is: what a checkpoint holds beside tensors, and what decides about faults and the best weights."""

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ..data.mixing import Positions

LIMIT = 1 << 53  # of counts: above it a file's numbers are not those of a run


@dataclass
class Position:
    """Optimizer steps done (skipped ones included), (epoch, index) of the next sample of each source, target tokens
    seen, and what decides about faults: the last losses, steps skipped in all and in a row, ``skip``, the steps (from
    0) that a replay passes over, and ``order``, how often the run was rolled back to go on in another data order.
    Of the evaluations: the lowest loss, its step, and how many were made since. ``steps_before``: those that the
    optimizer had taken in another run, on whose checkpoint this one began."""

    step: int = 0
    sample: Positions = ()
    tokens: int = 0
    losses: list[float] = field(default_factory=list)
    skipped: int = 0
    skipped_in_a_row: int = 0
    skip: list[int] = field(default_factory=list)
    order: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    since_best: int = 0
    steps_before: int = 0

    def evaluated(self, loss: float) -> "Position":
        """After an evaluation. A loss that is equal, or not finite, is no better."""
        if math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss):
            return replace(self, best_loss=loss, best_step=self.step, since_best=0)
        return replace(self, since_best=self.since_best + 1)

    @classmethod
    def read(cls, saved: dict[str, Any]) -> "Position":
        """The position in a checkpoint's ``state.json``. Raises ``ValueError`` naming a field that is not its kind."""
        if unknown := saved.keys() - {one.name for one in fields(cls)}:
            raise ValueError(f"position has no field {min(unknown)}")
        if absent := {"step", "sample"} - saved.keys():
            raise ValueError(f"position lacks {min(absent)}")
        for name, value in saved.items():
            if not _KINDS.get(name, _is_count)(value):
                raise ValueError(f"position.{name} is {str(value)[:60]}, which no run writes")
        sample = saved["sample"]
        if _is_pair(sample):  # as checkpoints had it while there was one source
            sample = [sample]
        if not sample and saved["step"]:
            raise ValueError(f"position.sample is empty after step {saved['step']}, which no run writes")
        return cls(**{**saved, "sample": tuple((epoch, index) for epoch, index in sample)})


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < LIMIT


def _is_pair(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_is_count, value))


def _is_loss(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


_KINDS = {
    "sample": lambda value: _is_pair(value) or (isinstance(value, (list, tuple)) and all(map(_is_pair, value))),
    "losses": lambda value: isinstance(value, list) and all(map(_is_loss, value)),
    "skip": lambda value: isinstance(value, list) and all(map(_is_count, value)),
    "best_loss": lambda value: value is None or _is_loss(value),
    "best_step": lambda value: value is None or _is_count(value),
}
