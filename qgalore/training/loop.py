"""The training loop. It receives built objects and knows neither configuration nor formats."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..data.order import SampleOrder
from ..errors import DoesNotFitError, Interrupted, NumericalError
from ..files import checkpoint
from ..files.filling import first_not_finite
from ..lowrank.optimizer import LowRankOptimizer
from ..models.loss import Loss
from ..parallel import ALONE, Team
from ..quant.counter import derive_key
from .keeping import PATIENCE, Keeper
from .position import Position
from .records import ProgressLine, Records, Silence, human_time, memory_bytes, memory_row
from .spikes import WINDOW, is_spike
from .stopping import NO_READER, StopSignal


class Samples(Protocol):
    """Training or held-out data."""

    def __len__(self) -> int: ...

    def batch(self, indices: Any) -> dict[str, Tensor]:
        """The samples at ``indices``, on the CPU, as ``loss`` takes them."""


class Evaluation(Protocol):
    """The result of an evaluation; ``str()`` is for the user."""

    loss: float

    def row(self) -> dict[str, Any]:
        """For metrics.jsonl."""


class Spike(NumericalError):
    """A loss far above the ones before it."""


@dataclass
class Loop:
    """Trains ``model`` to ``max_steps``; see :meth:`run`. ``lr_at(step)`` gives the learning rate of a step (from 0).

    ``loss`` is a sum over the targets of a batch, ``targets(batch)`` their number, ``unit`` what the progress line
    calls them; ``evaluate(model, batches, device)`` looks at the held-out data.

    ``order_for(n)`` gives the data order after n rollbacks; ``run_state`` goes into every checkpoint beside the
    position; ``folder`` is the run's own. The processes of a ``team`` share the micro-batches of a step, decide alike,
    write checkpoints together, and leave all other writing to one.
    """

    model: nn.Module
    loss: Loss
    optimizer: LowRankOptimizer
    train: Samples
    valid: Samples
    order_for: Callable[[int], SampleOrder]
    device: torch.device
    folder: Path
    lr_at: Callable[[int], float]
    position: Position
    run_state: dict[str, Any]
    seed: int
    max_steps: int
    micro_batch_size: int
    grad_accumulation: int
    clip_grad_norm: float
    eval_every: int
    eval_batches: int | None
    save_every: int | None
    keep_last: int
    keep_every: int | None
    max_skipped_in_a_row: int
    loss_spike: str
    spike_threshold: float
    plan: str  # of memory, printed if that runs out all the same
    targets: Callable[[dict[str, Tensor]], int]
    evaluate: Callable[[nn.Module, list[Callable[[], dict[str, Tensor]]], torch.device], Evaluation]
    unit: str = "tok"
    max_rollbacks: int = 3
    keep_best: bool = False
    early_stopping: int | None = None
    team: Team = ALONE

    def __post_init__(self) -> None:
        kind = Records if self.team.leads else Silence
        self.metrics = kind(self.folder / "metrics.jsonl")
        self.subspace = kind(self.folder / "subspace.jsonl")
        how = {"save_every": self.save_every, "keep_last": self.keep_last, "keep_every": self.keep_every}
        self.keeper = Keeper(self.folder / "checkpoints", **how, team=self.team)

    def run(self) -> Evaluation:
        """Train, evaluate, record, save, to ``max_steps`` or until ``early_stopping`` evaluations in a row brought no
        lower loss. Returns the last evaluation.

        A step whose loss or gradient is not finite is skipped; after ``max_skipped_in_a_row`` of them the state is
        saved and :class:`NumericalError` raised, as it is at the end if the last evaluation or a weight is not finite.
        After a signal the state is saved and :class:`Interrupted` raised.
        """
        progress = ProgressLine(self.max_steps, unit=self.unit)
        self.model.train()
        latest = None
        if self.save_every is None:
            print(
                f"note: train.save_every is not set: a checkpoint is saved after every {human_time(PATIENCE)} of work, "
                "and at the end",
                flush=True,
            )
        if self.position.step == 0 and self.optimizer.stepping == "fused":
            self._save_beginning()
        self._look_for_best()
        with StopSignal() as stop:
            while self.position.step < self.max_steps and not self._stops_early():
                row = self._guarded_step()
                if row is None:
                    continue
                events = self._drain_events()
                row["refresh_seconds"] = sum(event["seconds"] for event in events)
                self.metrics.append([row])
                self.subspace.append(events)
                if row["loss"] is not None:  # a skipped step has printed its own line
                    progress.show(row, self.optimizer.refresh_counts(), self.optimizer.waiting())
                step = self.position.step
                # what all must agree on: the gradients' norm, whose bits tell of any difference, and whether to stop
                # or, by the clock of the one that leads, to save
                note = 2 * (stop.number or 0) + self.keeper.overdue
                signalled, overdue = divmod(
                    self.team.meet(f"step {step}", digest=row["grad_norm"] or 0.0, note=note), 2
                )
                last = save = step == self.max_steps
                if last or step % self.eval_every == 0:
                    latest = self._evaluate()
                    self.position = self.position.evaluated(latest.loss)
                    last = last or self._stops_early()
                    save = last or (self.keep_best and self.position.best_step == step)
                if save or self.keeper.due(step) or overdue or signalled:
                    self._save()
                if signalled and not last:
                    why = "the end of the program that reads its output" if signalled == NO_READER else "a signal"
                    raise Interrupted(f"stopped by {why}; step {step} is saved, go on with --resume auto", signalled)
        if self._stops_early():
            where = self.position
            print(
                f"stopped early after step {where.step}: {where.since_best} evaluations brought no lower held-out loss "
                f"than step {where.best_step} (train.early_stopping {self.early_stopping}); the "
                "state is saved, a larger number goes on with --resume auto",
                flush=True,
            )
        return self._finite(latest or self._evaluate())

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
        return self.early_stopping is not None and self.position.since_best >= self.early_stopping

    def _look_for_best(self) -> None:
        """A resumed run whose best checkpoint is gone, pruned on another course or never kept, cannot export it."""
        step = self.position.best_step
        if not self.keep_best or step is None:
            return
        if not self.team.of_first("the best checkpoint", self.keeper.path(step).exists):
            print(
                f"note: the best checkpoint so far, of step {step}, is gone; the best is sought from here on",
                flush=True,
            )
            self.position = replace(self.position, best_loss=None, best_step=None)

    def _guarded_step(self) -> dict[str, Any] | None:
        """One step and its record. A step that fails numerically is skipped; None if the run went back instead."""
        if self.position.step in self.position.skip:
            return self._skip(NumericalError("its gradient was not finite when it was first taken"))
        try:
            with self.team.together("the end of a step"):
                return self._step()
        except torch.OutOfMemoryError as error:
            raise DoesNotFitError(self._out_of_memory(str(error))) from error
        except RuntimeError as error:
            if "can't allocate memory" not in str(error):  # how a CPU says it
                raise
            raise DoesNotFitError(self._out_of_memory(str(error))) from error
        except NumericalError as error:
            if isinstance(error, Spike) and self.loss_spike == "rollback" and self._roll_back(error):
                return None
            if self.optimizer.inside_step:
                return self._replay(error)
            return self._skip(error)

    def _out_of_memory(self, error: str) -> str:
        measured = f"{memory_bytes(self.device) / 2**30:.2f} GiB at most"
        if self.device.type == "cuda":
            measured += f", {torch.cuda.max_memory_reserved(self.device) / 2**30:.2f} GiB reserved"
        return (
            f"out of memory in step {self.position.step + 1}: {error.splitlines()[0]}\nplanned:\n{self.plan}\n"
            f"measured: {measured}.\nLower train.micro_batch_size, data.sequence_length or lowrank.rank, or set "
            "train.activation_checkpointing=offload; close what else uses the device"
        )

    def _skip(self, error: NumericalError) -> dict[str, Any]:
        """Close the failed step without an update and go on with the next samples, or stop after too many."""
        self.optimizer.skip()
        where = self.position
        _, after = self._order().take(where.sample, self.micro_batch_size * self.grad_accumulation)
        in_a_row = where.skipped_in_a_row + 1
        self.position = replace(
            where, step=where.step + 1, sample=after, skipped=where.skipped + 1, skipped_in_a_row=in_a_row
        )
        print(f"step {where.step + 1}/{self.max_steps} | skipped: {error}", flush=True)
        row = {"step": where.step + 1, "loss": None, "lr": self.lr_at(where.step), "grad_norm": None}
        row |= {"tokens": where.tokens, "tokens_per_second": 0.0, **memory_row(self.device)}
        row |= {"step_seconds": 0.0, "refresh_seconds": 0.0, "skipped": str(error)}
        if in_a_row >= self.max_skipped_in_a_row:
            self.metrics.append([row])
            saved = self._save()
            raise NumericalError(
                f"{error}. {in_a_row} step{'s' if in_a_row > 1 else ''} in a row failed (train.max_skipped_in_a_row). "
                f"The last good weights are saved in {saved}. Lower train.lr, lengthen train.warmup_steps or set "
                "train.clip_grad_norm"
            ) from error
        return row

    def _roll_back(self, error: Spike) -> bool:
        """Return to the newest checkpoint and go on from it in another data order; False if that cannot be done."""
        found, state, _ = self.keeper.newest(lambda: self.keeper.regular(self._best_step()))
        if found is None or self.position.order >= self.max_rollbacks:
            why = "there is no regular checkpoint yet" if found is None else f"{self.max_rollbacks} rollbacks were made"
            print(f"no rollback: {why}; the step is skipped instead", flush=True)
            return False
        self._return_to(found, state, order=self.position.order + 1, skip=self.position.skip)
        print(f"rolled back to {found} and another data order: {error}", flush=True)
        return True

    def _replay(self, error: NumericalError) -> None:
        """Undo a half-taken step. Fused stepping finds a bad gradient only when it arrives, with other tensors already
        stepped, so the run returns to its newest checkpoint, takes the same steps again and passes over this one.

        Raises :class:`NumericalError` if every checkpoint was damaged or deleted from outside.
        """
        found, state, complaints = self.keeper.newest()
        if found is None:
            raise NumericalError(
                f"{error}. No usable checkpoint is left in {self.folder / 'checkpoints'} to replay from "
                f"({'; '.join(map(str, complaints)) or 'all are gone'}), though one was written before the first step; "
                "find out what changes that folder, or set train.stepping=deferred, which looks at all gradients "
                "before it steps"
            ) from error
        self._return_to(found, state, order=self.position.order, skip=[*self.position.skip, self.position.step])
        print(f"{error}: replaying from {found} without that step", flush=True)

    def _return_to(self, path: Path, state: dict[str, Any], **changes: Any) -> None:
        """Take the state of a checkpoint, with some fields of its position changed."""
        self.optimizer.skip()
        checkpoint.load_into(path, state, self.model, self.optimizer)
        self.optimizer.events.clear()
        self.position = replace(Position.read(state["position"]), **changes)
        self.keeper.leave(self.position.step)
        for records in (self.metrics, self.subspace):
            records.cut_back(self.position.step)

    def _order(self) -> SampleOrder:
        return self.order_for(self.position.order)

    def _step(self) -> dict[str, Any]:
        started = time.perf_counter()
        step = self.position.step
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr_at(step)
        torch.manual_seed(derive_key(self.seed, step)[0] & 0x7FFFFFFF)
        size = self.micro_batch_size
        indices, after = self._order().take(self.position.sample, size * self.grad_accumulation)
        numbers = self.team.deal(range(self.grad_accumulation))
        batches = [self.train.batch(indices[n * size : (n + 1) * size]) for n in numbers]
        tokens = self.team.total("the targets of a step", sum(map(self.targets, batches)))
        loss = 0.0
        for number, batch in zip(numbers, batches, strict=True):
            if number:  # dropout is a function of step and micro-batch, whoever takes it
                torch.manual_seed(derive_key(self.seed, step, number)[0] & 0x7FFFFFFF)
            part = self._forward(batch, tokens)
            loss += float(part.detach())
            if number == numbers[-1]:  # before the last backward pass: fused stepping updates in it
                loss = self.team.total("the loss of a step", loss)
                self._check_spike(loss)
            self.team.meet("a backward pass")  # in which sharded weights are gathered: not while one has failed
            part.backward()
        norm = self._take_step()
        self.position = replace(
            self.position,
            step=step + 1,
            sample=after,
            tokens=self.position.tokens + tokens,
            losses=[*self.position.losses, loss][-WINDOW:],
            skipped_in_a_row=0,
        )
        if (names := self.optimizer.untouched) and self.position.step == 1:
            print(
                f"warning: {len(names)} tensors got no gradient in the first step, for example {names[0]} (a mixture's "
                "experts without tokens wait for some)",
                flush=True,
            )
        seconds = time.perf_counter() - started
        return {
            "step": step + 1,
            "loss": loss,
            "lr": self.optimizer.param_groups[0]["lr"],
            "grad_norm": norm,
            "tokens": self.position.tokens,
            "tokens_per_second": tokens / seconds,
            "step_seconds": seconds,
            **memory_row(self.device),
            **({"without_gradient": len(names), "waiting": self.optimizer.waiting()} if names else {}),
        }

    def _forward(self, batch: dict[str, Tensor], tokens: int) -> Tensor:
        """One micro-batch's share of the mean loss over a step's ``tokens`` targets."""
        batch = {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
        loss = self.loss(self.model, batch) / max(tokens, 1)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise NumericalError(f"the loss is {value} in step {self.position.step + 1}")
        return loss

    def _check_spike(self, loss: float) -> None:
        if self.loss_spike != "off" and is_spike(self.position.losses, loss, self.spike_threshold):
            spike = Spike(f"the loss {loss:.4f} is a spike in step {self.position.step + 1}")
            if self.loss_spike != "warn":
                raise spike
            print(f"warning: {spike} (train.loss_spike: warn)", flush=True)

    def _take_step(self) -> float:
        """Refresh, clip and step; returns the gradient norm before clipping."""
        if self.clip_grad_norm > 0:
            self.optimizer.refresh()
            norm = self.optimizer.clip(self.model.parameters(), self.clip_grad_norm)
            self.optimizer.step()
            return norm
        self.optimizer.step()
        return self.optimizer.grad_norm

    def _drain_events(self) -> list[dict[str, Any]]:
        """Refresh records of this step, with the step numbered as in metrics.jsonl (from 1)."""
        rows = [{**event, "step": event["step"] + 1} for event in self.optimizer.events]
        self.optimizer.events.clear()
        return rows

    def _evaluate(self) -> Evaluation:
        size = self.micro_batch_size
        starts = range(0, len(self.valid), size)[: self.eval_batches]
        batches = [partial(self.valid.batch, range(s, min(s + size, len(self.valid)))) for s in starts]
        result = self.evaluate(self.model, batches, device=self.device)
        result = self.team.of_first("an evaluation", lambda: result)
        self.metrics.append_evaluation({"step": self.position.step, **result.row()})
        print(f"step {self.position.step}/{self.max_steps} | {result}", flush=True)
        return result

    def _save_beginning(self) -> None:
        """A checkpoint before the first step, with which fused stepping can undo one (:meth:`_replay`) at any time."""
        self.keeper.leave(self.position.step)
        started, path = time.perf_counter(), self._save()
        print(f"the beginning is saved in {path} ({time.perf_counter() - started:.1f} s)", flush=True)

    def _best_step(self) -> int | None:
        return self.position.best_step if self.keep_best else None

    def _save(self) -> Path:
        rollback = self.loss_spike == "rollback"
        return self.keeper.save(
            self.position, self.model, self.optimizer, self.run_state, best=self._best_step(), for_rollback=rollback
        )
