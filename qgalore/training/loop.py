"""The training loop. It receives built objects and knows neither configuration nor formats."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Interrupted, NumericalError, counted
from ..files.filling import first_not_finite
from ..lowrank.optimizer import LowRankOptimizer
from ..memory import orthogonal_work
from ..models.loss import Loss
from ..parallel import ALONE, Team, apart
from .course import Course
from .keeping import PATIENCE
from .parts import Batch, Data, Evaluating, Evaluation, Faults, Samples, Saving, Stepping
from .position import Position
from .records import ProgressLine, human_time, memory_row
from .recovery import Recovery
from .spikes import WINDOW
from .stepping import Order
from .stopping import NO_READER, StopSignal


@dataclass
class Loop:
    """Trains ``model`` to the last step; see :meth:`run`. ``loss`` is a sum over the targets of a batch.

    The processes of a ``team`` share the micro-batches of a step, decide alike, write checkpoints together, and leave
    all other writing to one.
    """

    model: nn.Module
    loss: Loss
    optimizer: LowRankOptimizer
    device: torch.device
    data: Data
    stepping: Stepping
    evaluating: Evaluating
    saving: Saving
    faults: Faults
    order: Order
    start: Position
    team: Team = ALONE

    def __post_init__(self) -> None:
        self.course = Course(self.model, self.optimizer, self.start, self.saving, self.team)
        self._work = orthogonal_work.of_training(self.model, {tensor.rule_name for tensor in self.optimizer.tensors})
        self._tokens = 0  # that this process puts through the model in a step, padding included
        self._failure: Exception | None = None  # of this process, which the others have not heard of
        self.recovery = Recovery(self.course, self.data, self.stepping, self.faults, self.order, self.device)

    @property
    def position(self) -> Position:
        """Where the run is now."""
        return self.course.position

    def run(self) -> Evaluation:
        """Train, evaluate, record, save, to the last step or until ``early_stopping`` evaluations in a row brought no
        lower loss. A fresh run is evaluated before its first step too. Returns the last evaluation.

        A step whose loss or gradient is not finite is skipped; after ``max_skipped_in_a_row`` of them the state is
        saved and :class:`NumericalError` raised, as it is at the end if the last evaluation or a weight is not finite.
        After a signal the state is saved and :class:`Interrupted` raised. Whatever ends it, no checkpoint is half
        written then.
        """
        with self.course.keeper.to_the_end():
            return self._finite(self._take_steps() or self._evaluate())

    def _take_steps(self) -> Evaluation | None:
        """All that :meth:`run` does up to the last step; returns the last evaluation, if there was one."""
        course, last_step = self.course, self.stepping.max_steps
        progress = ProgressLine(last_step, unit=self.data.unit)
        self.model.train()
        latest = None
        if self.saving.save_every is None:
            print(
                f"note: train.save_every is not set: a checkpoint is saved after every {human_time(PATIENCE)} of work, "
                "and at the end",
                flush=True,
            )
        if self.position.step == 0 and (self.order.may_leave_traces or self.position.steps_before):
            self._save_beginning()
        course.look_for_best()
        with StopSignal() as stop:
            if self.position.step == 0:
                self._evaluate()  # no checkpoint belongs to it, so it is never the best
            while self.position.step < last_step and not self._stops_early():
                # whether to stop or, by the clock of the one that leads, to save: for all to agree at a step's end
                taken = self.recovery.guarded(self._step, lambda: 2 * (stop.number or 0) + course.keeper.overdue)
                if taken is None:
                    continue
                row, note = taken
                signalled, overdue = divmod(note, 2)
                self._alone(partial(self._record, row, progress))
                if self.team.size == 1:  # nobody else has to be asked about a signal that came since
                    signalled = signalled or stop.number or 0
                step = self.position.step
                course.keeper.look()
                last = save = step == last_step
                if last or step % self.evaluating.every == 0:
                    latest = self._evaluate()
                    course.position = self.position.evaluated(latest.loss)
                    last = last or self._stops_early()
                    save = last or course.best_step == step
                if save or course.keeper.due(step) or overdue or signalled:
                    self._raise_failure()
                    course.save(beside=not (last or signalled))  # what comes after those two needs it complete
                if signalled and not last:
                    why = "the end of the program that reads its output" if signalled == NO_READER else "a signal"
                    raise Interrupted(f"stopped by {why}; step {step} is saved, go on with --resume auto", signalled)
        if self._stops_early():
            self._say_stopped()
        return latest

    def _record(self, row: dict[str, Any], progress: ProgressLine) -> None:
        events = self.course.drain_events()
        row["refresh_seconds"] = sum(event["seconds"] for event in events)
        self.course.record(row, events, self.course.drain_observations())
        if row["loss"] is not None:  # a skipped step has printed its own line
            remark = ""
            if self._work is not None:
                remark = f"orthogonalisation {self._work.share(self._tokens):.1%} of the arithmetic"
            progress.show(row, self.optimizer.refresh_counts(), self.optimizer.waiting(), remark)

    def _finite(self, latest: Evaluation) -> Evaluation:
        """``latest``, the last evaluation, if it and all weights are finite. No run ends well with NaN in its model."""
        name = first_not_finite(self.model)
        if math.isfinite(latest.loss) and name is None:
            return latest
        what = f"the held-out loss is {latest.loss}" if name is None else f"{name} holds values that are not finite"
        raise NumericalError(
            f"{what} after the last step, {self.position.step}, so nothing is exported. Lower train.lr, lengthen "
            "train.warmup_steps or set train.clip_grad_norm; an earlier checkpoint can be exported with tools/export.py"
        )

    def _stops_early(self) -> bool:
        limit = self.evaluating.early_stopping
        return limit is not None and self.position.since_best >= limit

    def _say_stopped(self) -> None:
        where = self.position
        print(
            f"stopped early after step {where.step}: {counted(where.since_best, 'evaluation')} brought no lower "
            f"held-out loss than step {where.best_step} (train.early_stopping "
            f"{self.evaluating.early_stopping}); the state is saved, a larger number goes on with --resume auto",
            flush=True,
        )

    def _step(self) -> dict[str, Any]:
        started = time.perf_counter()
        how, step = self.stepping, self.position.step
        for group in self.optimizer.param_groups:
            group["lr"] = how.lr_at(step)
        size = how.micro_batch_size
        numbers = self.team.deal(range(how.grad_accumulation))
        batches: list[Batch] = [{} for _ in numbers]
        after, mine = self.position.sample, 0

        def load() -> None:
            nonlocal after, mine
            indices, after = self.data.order_for(self.position.order).take(self.position.sample, how.samples)
            batches[:] = [self.data.train.batch(indices[n * size : (n + 1) * size]) for n in numbers]
            self._tokens = sum(batch["input_ids"].numel() for batch in batches)
            mine = sum(map(self.data.targets, batches))

        self._alone(load)
        tokens = self.team.begin_total("the targets of a step", mine)
        share = partial(self._share, tokens=tokens)
        loss, norm = self.order.take(step, numbers, batches, share, self.recovery.check_spike)
        self.course.position = replace(
            self.position,
            step=step + 1,
            sample=after,
            tokens=self.position.tokens + tokens(),
            losses=[*self.position.losses, loss][-WINDOW:],
            skipped_in_a_row=0,
        )
        if (names := self.optimizer.untouched) and self.position.step == 1:
            print(
                f"warning: {counted(len(names), 'tensor')} got no gradient in the first step, for example {names[0]} "
                "(a mixture's experts without tokens wait for some)",
                flush=True,
            )
        seconds = time.perf_counter() - started
        return {
            "step": step + 1,
            "loss": loss,
            "lr": self.optimizer.param_groups[0]["lr"],
            "grad_norm": norm,
            "tokens": self.position.tokens,
            "tokens_per_second": tokens() / seconds,
            "step_seconds": seconds,
            **memory_row(self.device),
            **({"without_gradient": len(names), "waiting": self.optimizer.waiting()} if names else {}),
        }

    def _share(self, batch: Batch, tokens: Callable[[], int]) -> Tensor:
        """One micro-batch's share of the mean loss over a step's ``tokens()`` targets."""
        self._raise_failure()
        batch = {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
        return self.loss(self.model, batch) / max(tokens(), 1)

    def _alone(self, work: Callable[[], object]) -> None:
        """Do ``work``, which is this process's alone, between two steps. In a team its error waits until the others can
        hear of it: they may be about to gather weights, for which they need this process."""
        try:
            work()
        except Exception as error:
            if self.team.size == 1:
                raise
            self._failure = self._failure or error

    def _raise_failure(self) -> None:
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _evaluate(self) -> Evaluation:
        self._raise_failure()
        self.team.meet("an evaluation")  # of a split model, whose weights all gather together
        sets = {name: self._batches(samples) for name, samples in self.data.valid.items()}
        result = self.data.evaluate(self.model, sets, device=self.device)
        result = self.team.of_first("the result of an evaluation", lambda: result)
        apart.drop_all(self.model)
        where = self.position
        drawn = self.data.order_for(where.order).drawn(where.sample)
        row = {"step": where.step, **result.row(), **{f"drawn/{name}": count for name, count in drawn.items()}}
        self.course.record_evaluation(row)
        print(f"step {where.step}/{self.stepping.max_steps} | {result}", flush=True)
        return result

    def _batches(self, samples: Samples) -> list[Callable[[], Batch]]:
        """Functions that make the micro-batches of a held-out set that are looked at."""
        size = self.stepping.micro_batch_size
        starts = range(0, len(samples), size)[: self.evaluating.batches]
        return [partial(samples.batch, range(s, min(s + size, len(samples)))) for s in starts]

    def _save_beginning(self) -> None:
        """A checkpoint before the first step, from which recovery can undo a half-taken step at any time. From it a run
        that began on another's checkpoint can go on without that one."""
        self.course.keeper.leave(self.position.step)
        started, path = time.perf_counter(), self.course.save()
        print(f"the beginning is saved in {path} ({time.perf_counter() - started:.1f} s)", flush=True)
