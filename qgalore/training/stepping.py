"""The two orders in which a step goes through micro-batches and blocks; both give the step's loss and gradient norm.

*Layer-major*: all micro-batches go through one block before the next one begins, in both directions. The loss of the
step is known before any weight moves, and the gradients of one block exist at a time. *Batch-major*: one micro-batch
after another goes through the whole model, as an ordinary loop does; the optimizer's hooks see to the rest.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from ..errors import ConfigError, NumericalError
from ..lowrank.optimizer import LowRankOptimizer
from ..parallel.telling import is_told
from ..quant.counter import derive_key
from ..steps import walk
from ..steps.activations import Activations
from ..steps.blocks import Layout, NotWalkableError
from ..steps.reducing import Steps
from ..steps.turns import AlwaysThere, Turns
from .parts import Batch, Stepping

Share = Callable[[Batch], Tensor]  # a micro-batch's share of the step's loss, a scalar with its graph
Look = Callable[[float], None]  # at the loss of a whole step; raises NumericalError to have the step skipped


class Order(Protocol):
    """A way through a step. ``take`` steps every tensor and closes the optimizer's step.

    It raises :class:`NumericalError` for a loss or a gradient that is not finite. ``left_traces()`` then tells whether
    something has changed already, so that only a checkpoint can undo the step; ``may_leave_traces`` whether that can
    happen at all.
    """

    may_leave_traces: bool

    def take(self, step: int, numbers: Sequence[int], batches: Sequence[Batch], share: Share, look: Look) -> tuple: ...

    def left_traces(self) -> bool: ...


@dataclass
class BatchMajor:
    """One micro-batch after another through the whole model."""

    model: nn.Module
    optimizer: LowRankOptimizer
    how: Stepping

    def __post_init__(self) -> None:
        self.may_leave_traces = self.optimizer.stepping == "fused"

    def take(
        self, step: int, numbers: Sequence[int], batches: Sequence[Batch], share: Share, look: Look
    ) -> tuple[float, float]:
        """``numbers`` are those of the micro-batches of this process among all of the step."""
        torch.manual_seed(derive_key(self.how.seed, step)[0] & 0x7FFFFFFF)
        loss = 0.0
        for number, batch in zip(numbers, batches, strict=True):
            if number:  # dropout is a function of step and micro-batch, whoever takes it
                torch.manual_seed(derive_key(self.how.seed, step, number)[0] & 0x7FFFFFFF)
            part = share(batch)
            loss += _finite(float(part.detach()), step)
            if number == numbers[-1]:  # before the last backward pass: fused stepping updates in it
                loss = self.optimizer.team.total("the loss of a step", loss)
                look(loss)
            self.optimizer.team.meet("a backward pass")
            part.backward()
        return loss, self._update()

    def _update(self) -> float:
        """Refresh, clip and step; returns the gradient norm before clipping."""
        if self.how.clip_grad_norm > 0:
            self.optimizer.refresh()
            norm = self.optimizer.clip(self.model.parameters(), self.how.clip_grad_norm)
            self.optimizer.step()
            return norm
        self.optimizer.step()
        return self.optimizer.grad_norm

    def left_traces(self) -> bool:
        """Fused stepping finds a bad gradient when it arrives, with other tensors already stepped."""
        return self.optimizer.inside_step


@dataclass
class LayerMajor:
    """All micro-batches through one block after another. The optimizer's stepping is ``manual``."""

    model: nn.Module
    optimizer: LowRankOptimizer
    how: Stepping
    layout: Layout
    kept: Activations = field(default_factory=Activations)
    turns: Turns = field(default_factory=AlwaysThere)
    may_leave_traces = True

    def take(
        self, step: int, numbers: Sequence[int], batches: Sequence[Batch], share: Share, look: Look
    ) -> tuple[float, float]:
        """As :meth:`BatchMajor.take`. Raises :class:`ConfigError` if a micro-batch takes another way through the model
        than the one before the first step did."""
        self.optimizer.accumulate_in_fp32(self.how.grad_accumulation > 1)  # whoever takes the others
        loss, clips = [], self.how.clip_grad_norm > 0

        def decide(losses: Tensor) -> bool:
            loss.append(steps.total(sum(_finite(value, step) for value in losses.tolist())))
            look(loss[0])
            return True

        try:
            with Steps(self.optimizer, self.layout, keep=clips, at_once=not self.turns.stays) as steps:
                walk.walk(
                    self.layout,
                    [partial(share, batch) for batch in batches],
                    reseed=lambda place, part: walk.reseed(self.how.seed, step, numbers[place], part),
                    decide=decide,
                    step=steps,
                    activations=self.kept,
                    turns=self.turns,
                    attempt=steps.attempt,
                    settle=steps.raise_failure,
                )
        except NotWalkableError as reason:
            whole = " parallel=replicate" if any(t.owner is not None for t in self.optimizer.tensors) else ""
            raise ConfigError(
                f"step {step + 1} cannot be walked block by block as the trial before the first step was: {reason}. "
                f"Go on with --resume auto train.order=batch_major{whole}"
            ) from reason
        if clips:
            norm = self.optimizer.clip(self.model.parameters(), self.how.clip_grad_norm)
            self._step_kept()
            return loss[0], norm
        self.optimizer.close()
        return loss[0], self.optimizer.grad_norm

    def _step_kept(self) -> None:
        """Step by the gradients that were kept for the norm of all. Blocks that have left the device come back. A
        process that fails goes on taking part until all blocks have come, for the others do not meet before."""
        optimizer = self.optimizer
        pending = {tensor.name: tensor for tensor in optimizer.pending()}
        failures: list[Exception] = []

        def step_part(number: int) -> None:
            inside = number < len(self.layout)
            parameters = self.layout.blocks[number].parameters() if inside else self.layout.outside
            own = (tensor.name for tensor in optimizer.tensors_of(parameters))
            tensors = [pending.pop(name) for name in own if name in pending]
            if failures:
                optimizer.hand_out(tensors)
                return
            try:
                optimizer.move(tensors)
            except Exception as error:
                if optimizer.team.size == 1 or is_told(error):
                    raise
                failures.append(error)

        self.turns.visit(step_part)
        if failures:
            raise failures[0]
        optimizer.move(pending.values())
        optimizer.close()

    def left_traces(self) -> bool:
        """Blocks above the one with the bad gradient have stepped, or have bases that are new."""
        return self.optimizer.inside_step or self.optimizer.has_refreshed


def _finite(loss: float, step: int) -> float:
    if not math.isfinite(loss):
        raise NumericalError(f"the loss is {loss} in step {step + 1}")
    return loss
