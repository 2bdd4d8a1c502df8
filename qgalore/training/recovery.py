"""What becomes of a step that fails: it is skipped, or the run goes back to a checkpoint and goes on from there."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import DoesNotFitError, NumericalError
from .course import Course
from .parts import Data, Faults, Stepping
from .records import memory_bytes, memory_row
from .spikes import is_spike
from .stepping import Order

Row = dict[str, Any]  # of metrics.jsonl


class Spike(NumericalError):
    """A loss far above the ones before it."""


@dataclass(frozen=True)
class Recovery:
    """Decides about the bad steps of a ``course``."""

    course: Course
    data: Data
    stepping: Stepping
    faults: Faults
    order: Order
    device: torch.device

    def guarded(self, take: Callable[[], Row], note: Callable[[], int]) -> tuple[Row, int] | None:
        """The record of the step that ``take()`` takes, and the largest ``note()`` of all processes at its end, where
        they agree on its number and its gradients' norm too. A step that fails numerically is skipped; None if the run
        went back instead. Raises :class:`DoesNotFitError` where memory runs out."""
        course, position = self.course, self.course.position
        if position.step in position.skip:
            return self._skip(NumericalError("its gradient was not finite when it was first taken"), note)
        try:
            with course.team.together(f"the end of step {position.step + 1}") as end:
                row = take()
                end.digest, end.note = row["grad_norm"], note()
            return row, end.note
        except torch.OutOfMemoryError as error:
            raise DoesNotFitError(self._out_of_memory(str(error))) from error
        except RuntimeError as error:
            if "can't allocate memory" not in str(error):  # how a CPU says it
                raise
            raise DoesNotFitError(self._out_of_memory(str(error))) from error
        except NumericalError as error:
            if isinstance(error, Spike) and self.faults.loss_spike == "rollback" and self._roll_back(error):
                return None
            if self.order.left_traces():
                self._replay(error)
                return None
            return self._skip(error, note)

    def check_spike(self, loss: float) -> None:
        """Look at the loss of a step before any weight moves. Raises :class:`Spike` if it is one that is not only to be
        warned of."""
        faults, position = self.faults, self.course.position
        if faults.loss_spike != "off" and is_spike(position.losses, loss, faults.spike_threshold):
            spike = Spike(f"the loss {loss:.4f} is a spike in step {position.step + 1}")
            if faults.loss_spike != "warn":
                raise spike
            print(f"warning: {spike} (train.loss_spike: warn)", flush=True)

    def _skip(self, error: NumericalError, note: Callable[[], int]) -> tuple[Row, int]:
        """Close the failed step without an update and go on with the next samples, or stop after too many."""
        course, where = self.course, self.course.position
        course.optimizer.skip()
        _, after = self.data.order_for(where.order).take(where.sample, self.stepping.samples)
        in_a_row = where.skipped_in_a_row + 1
        course.position = replace(
            where, step=where.step + 1, sample=after, skipped=where.skipped + 1, skipped_in_a_row=in_a_row
        )
        print(f"step {where.step + 1}/{self.stepping.max_steps} | skipped: {error}", flush=True)
        row = {"step": where.step + 1, "loss": None, "lr": self.stepping.lr_at(where.step), "grad_norm": None}
        row |= {"tokens": where.tokens, "tokens_per_second": 0.0, **memory_row(self.device)}
        row |= {"step_seconds": 0.0, "refresh_seconds": 0.0, "skipped": str(error)}
        if in_a_row >= self.faults.max_skipped_in_a_row:
            course.record(row)
            saved = course.save()
            raise NumericalError(
                f"{error}. {in_a_row} step{'s' if in_a_row > 1 else ''} in a row failed (train.max_skipped_in_a_row). "
                f"The last good weights are saved in {saved}. Lower train.lr, lengthen train.warmup_steps or set "
                "train.clip_grad_norm"
            ) from error
        return row, course.team.meet(f"the end of step {where.step + 1}, skipped", note=note())

    def _roll_back(self, error: Spike) -> bool:
        """Return to the newest checkpoint and go on from it in another data order; False if that cannot be done."""
        course, most = self.course, self.faults.max_rollbacks
        found, state, _ = course.keeper.newest(lambda: course.keeper.regular(course.best_step))
        if found is None or course.position.order >= most:
            why = "there is no regular checkpoint yet" if found is None else f"{most} rollbacks were made"
            print(f"no rollback: {why}; the step is skipped instead", flush=True)
            return False
        course.return_to(found, state, order=course.position.order + 1, skip=course.position.skip)
        print(f"rolled back to {found} and another data order: {error}", flush=True)
        return True

    def _replay(self, error: NumericalError) -> None:
        """Undo a half-taken step. Where tensors step before all gradients are there, a bad one is found with others
        already stepped. So the run returns to its newest checkpoint, takes the same steps again and passes over this
        one.

        Raises :class:`NumericalError` if every checkpoint was damaged or deleted from outside.
        """
        course = self.course
        found, state, complaints = course.keeper.newest()
        if found is None:
            raise NumericalError(
                f"{error}. No usable checkpoint is left in {course.keeper.folder} to replay from "
                f"({'; '.join(map(str, complaints)) or 'all are gone'}), though one was written before the first step; "
                "find out what changes that folder, or set train.order=batch_major with "
                "train.stepping=deferred and parallel=replicate, which looks at all gradients before it steps"
            ) from error
        where = course.position
        course.return_to(found, state, order=where.order, skip=[*where.skip, where.step])
        print(f"{error}: replaying from {found} without that step", flush=True)

    def _out_of_memory(self, error: str) -> str:
        measured = f"{memory_bytes(self.device) / 2**30:.2f} GiB at most"
        if self.device.type == "cuda":
            measured += f", {torch.cuda.max_memory_reserved(self.device) / 2**30:.2f} GiB reserved"
        return (
            f"out of memory in step {self.course.position.step + 1}: {error.splitlines()[0]}\nplanned:\n"
            f"{self.faults.plan}\nmeasured: {measured}.\nLower train.micro_batch_size, data.sequence_length or "
            "lowrank.rank, or set train.activation_checkpointing=offload; close what else uses the device"
        )
