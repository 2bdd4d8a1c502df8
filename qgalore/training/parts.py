"""What the loop is given, by name: data, how to step, when to evaluate, what to keep, what faults do."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ..data.mixing import MixedOrder, Samples

Batch = dict[str, Tensor]


class Evaluation(Protocol):
    """The result of an evaluation; ``str()`` is for the user."""

    loss: float

    def row(self) -> dict[str, Any]:
        """For metrics.jsonl."""
        ...


Evaluate = Callable[..., Evaluation]  # see Data
Room = Callable[[], int | None]  # bytes of host memory for a copy of the state; None if that is not known


def no_room() -> int:
    """For a run whose checkpoints are written while training waits."""
    return 0


@dataclass(frozen=True)
class Data:
    """What is trained on and what is held out.

    ``order_for(n)`` gives the order of the training samples after n rollbacks. ``targets(batch)`` counts what the loss
    of a batch is a sum over; the progress line calls these ``unit``. ``valid`` has the held-out sets by name; where
    there is one alone, it is called "". ``evaluate(model, sets, device=…)`` looks at the batches of each set, every
    batch given as a function that makes it.
    """

    train: Samples
    valid: Mapping[str, Samples]
    order_for: Callable[[int], MixedOrder]
    targets: Callable[[Batch], int]
    evaluate: Evaluate
    unit: str = "tok"


@dataclass(frozen=True)
class Stepping:
    """How a step is taken. ``lr_at(step)`` gives the learning rate of a step, counted from 0. ``grad_accumulation``
    counts the micro-batches of a step in all processes together. ``clip_grad_norm`` is 0 for no clipping."""

    lr_at: Callable[[int], float]
    seed: int
    max_steps: int
    micro_batch_size: int
    grad_accumulation: int = 1
    clip_grad_norm: float = 0.0

    @property
    def samples(self) -> int:
        """In a step."""
        return self.micro_batch_size * self.grad_accumulation


@dataclass(frozen=True)
class Evaluating:
    """When the held-out data are looked at: after ``every`` steps, at most so many ``batches`` of them (None: all). The
    run ends after ``early_stopping`` evaluations in a row that brought no lower loss."""

    every: int
    batches: int | None = None
    early_stopping: int | None = None


@dataclass(frozen=True)
class Saving:
    """What is kept in ``folder``, the run's own, and when (see :class:`keeping.Keeper`). ``run_state`` goes into every
    checkpoint beside the position. ``for_rollback`` keeps the newest checkpoint that a rollback may return to. While
    one is written, training goes on from a copy of its state, if there is ``room()`` for that."""

    folder: Path
    run_state: dict[str, Any]
    save_every: int | None = None
    keep_last: int = 2
    keep_every: int | None = None
    keep_best: bool = False
    for_rollback: bool = False
    room: Room = no_room


@dataclass(frozen=True)
class Faults:
    """What a bad step does. ``loss_spike`` is one of :data:`spikes.POLICIES`; ``spike_threshold`` counts standard
    deviations. ``plan`` is the memory plan in words, shown if memory runs out all the same."""

    max_skipped_in_a_row: int
    loss_spike: str
    spike_threshold: float
    max_rollbacks: int = 3
    plan: str = ""
