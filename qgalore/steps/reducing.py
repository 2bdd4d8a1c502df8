"""The steps of a walk's tensors: in several processes a block's gradients are summed while the next block works.

The processes do not wait for each other at a block. What they do together is the same for all and known beforehand, so
a process that fails goes on taking part, without computing, until the others have heard of it.
"""

import traceback
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NumericalError, RankError
from ..lowrank.optimizer import LowRankOptimizer
from ..lowrank.tensors.base import TrainedTensor
from ..parallel.pending import Note, Pending
from ..parallel.telling import is_told, told
from .blocks import Layout


@dataclass
class _Part:
    """A part of the model whose sums are under way. ``note`` tells which of its ``tensors`` have a gradient in a
    process; None if that is known. Those without are ``idle`` once the note was heard. ``unsent``: those of which no
    gradient was expected, and whose sums are yet to begin."""

    tensors: list[TrainedTensor]
    sums: Pending
    note: Note | None = None
    unsent: list[TrainedTensor] = field(default_factory=list)
    idle: list[TrainedTensor] = field(default_factory=list)


class Steps:
    """What a walk calls for each part of a model whose gradients are complete in this process. With ``keep`` gradients
    stay, for the norm of all of them, and nothing steps here. With ``at_once`` the walk waits for the sums of each
    part, because its weights do not stay on the device.

    In a team each process leaves a note for a block: whether it has failed, and which of the block's tensors have a
    gradient, as a mixture's expert may have tokens in one process alone. Nobody waits for it. Sums and note travel
    while the walk goes on with the next block. Then the note is heard, and the block, whose sums have arrived in the
    meantime, takes its step. So the gradients of two blocks exist at a time, and a failure is known one block later.
    What the epilogue's note would say travels with the loss (:meth:`total`). The prologue's note and sums go together,
    and nothing is left to do beside them. The processes meet only for the loss, and where all look for a due basis
    together. Where one process steps a matrix for all, sums go to it alone, and what it has changed is handed out after
    the step.
    """

    def __init__(self, optimizer: LowRankOptimizer, layout: Layout, *, keep: bool, at_once: bool = False) -> None:
        self.optimizer, self.layout, self.keep = optimizer, layout, keep
        self.at_once = at_once or optimizer.team.size == 1
        self._begun: set[str] = set()
        self._behind: list[TrainedTensor] = []  # of the epilogue, those with a gradient in some process
        self._under_way: _Part | None = None
        self._failure: Exception | None = None  # of this process, which others have not heard of

    def attempt(self, work: Callable[[], Any]) -> None:
        """Do ``work``, which is this process's alone. In a team its error waits until all can hear of it, and later
        work is left undone."""
        if self._failure is None:
            self._holding(work)

    def raise_failure(self) -> None:
        """Raise what :meth:`attempt` has kept: where the processes are about to meet, and so will hear of it."""
        if self._failure is not None:
            raise self._failure

    def total(self, loss: float) -> float:
        """The sum of ``loss`` over the processes, before any weight moves. With it they tell each other what has a
        gradient behind the blocks."""
        asked = self._asked("epilogue", ())
        held = [tensor.holds_gradient() for tensor in asked]
        total, held = self.optimizer.team.total_and_any("the loss of a step", loss, held)
        self._behind = [tensor for tensor, has in zip(asked, held, strict=True) if has]
        return total

    def __call__(self, name: str, parameters: list[nn.Parameter]) -> None:
        """``name`` and ``parameters`` as :func:`walk.walk` gives them."""
        self._hear()
        before, part = self._under_way, self._begin(name, self._asked(name, parameters))
        self._under_way = part
        if before is not None:
            self._holding(partial(self._finish, before))
        if name == "prologue" or self.at_once:
            self._hear()
            self._finish(part)
            self._under_way = None
            self.raise_failure()

    def _holding(self, work: Callable[[], Any]) -> None:
        try:
            work()
        except Exception as error:
            if self.optimizer.team.size == 1 or is_told(error) or error is self._failure:
                raise
            traceback.clear_frames(error.__traceback__)  # which would hold on to activations
            self._failure = self._failure or error

    def _hear(self) -> None:
        """The note of the part under way, which all have left."""
        part = self._under_way
        if part is not None and part.note is not None:
            note, part.note = part.note, None
            held = self.optimizer.team.hear(note, self._failure)
            part.idle = [tensor for tensor, has in zip(part.tensors, held, strict=True) if not has]
            part.tensors = [tensor for tensor, has in zip(part.tensors, held, strict=True) if has]
            part.unsent = [tensor for tensor in part.unsent if tensor in part.tensors]

    def _asked(self, name: str, parameters: Iterable[nn.Parameter]) -> list[TrainedTensor]:
        """The tensors of a part, the same in every process, whichever of them has gradients."""
        outside, late = self.layout.outside, self.layout.late
        if name == "epilogue":
            parameters = [p for p in outside if id(p) not in late]
        elif name == "prologue":
            parameters = [*outside, *self.layout.blocks.parameters()]
        asked = [tensor for tensor in self.optimizer.tensors_of(parameters) if tensor.name not in self._begun]
        return [tensor for tensor in asked if any(leaf.requires_grad for leaf in tensor.leaves())]

    @torch.no_grad()
    def _begin(self, name: str, asked: list[TrainedTensor]) -> _Part:
        """Begin to sum the gradients of a part: of a block those of all its tensors, of the prologue those that had one
        in the last step too. Who has none adds zeros."""
        team = self.optimizer.team
        if name == "epilogue":
            asked = self._behind
        elif team.size == 1:
            asked = [tensor for tensor in asked if tensor.holds_gradient()]
        self._begun |= {tensor.name for tensor in asked}
        if team.size == 1:
            return _Part(asked, Pending())
        note, held = None, [tensor.holds_gradient() for tensor in asked]
        unsent = [t for t in asked if name == "prologue" and t.name in self.optimizer.untouched]
        try:
            if name != "epilogue":
                note = team.leave_note(self._failure is not None, held)
            return _Part(asked, self._send([t for t in asked if t not in unsent]), note, unsent)
        except Exception as error:
            if is_told(error):
                raise
            # It cannot even take part. The others find its connections closed as soon as it has ended.
            raise told(self._failure or error) from error

    def _send(self, asked: list[TrainedTensor]) -> Pending:
        team = self.optimizer.team
        for tensor in asked:
            _or_zeros(tensor)
        return team.begin([one for tensor in asked for one in tensor.to_sum()])

    def _finish(self, part: _Part) -> None:
        """Wait for the sums of ``part``; find the bases that are due from them, and step."""
        part.sums.wait()
        if part.unsent:
            self._send(part.unsent).wait()
        for tensor in part.idle:
            tensor.drop_gradient()
        failure = self._prepare(part.tensors)
        if not self.keep:
            failure = self._look_at(part.tensors) or failure
        if self.keep or failure is not None:  # who keeps gradients steps later; who has failed still takes part
            self.optimizer.hand_out(part.tensors, weights=not self.keep)
        else:
            self.optimizer.move(part.tensors)
        if failure is not None:
            raise failure

    def _look_at(self, tensors: list[TrainedTensor]) -> Exception | None:
        """Raise :class:`NumericalError`, in all processes, if a gradient is not finite. Another error, of this process
        alone, is returned. It has added to the sums all the same, because the others are sure that it does."""
        team, added = self.optimizer.team, False

        def add(squares: list[Tensor]) -> None:
            nonlocal added
            added = True
            team.add_(squares)

        try:
            self.optimizer.look_at(tensors, add)
        except Exception as error:
            if isinstance(error, NumericalError) or is_told(error):
                raise
            owned = [tensor for tensor in tensors if tensor.owner is not None]
            if owned and not added:
                add([torch.zeros((), device=tensor.leaves()[0].device) for tensor in owned])
            return error
        return None

    def _prepare(self, tensors: list[TrainedTensor]) -> Exception | None:
        """Find the bases that are due. Returns an error of this process for ``tensors`` that it steps for all, since
        the others do not wait for it here."""
        team, failure = self.optimizer.team, None
        for tensor in tensors:
            meets = team.size > 1 and tensor.owner is None and tensor.awaits_refresh()
            if meets:
                self.raise_failure()
            try:
                with team.together(f"the new basis of {tensor.name}") if meets else nullcontext():
                    self.optimizer.prepare_summed(tensor)
            except Exception as error:
                if tensor.owner is None or is_told(error):
                    raise
                failure = failure or error
        return failure

    def __enter__(self) -> "Steps":
        return self

    def __exit__(self, *_: Any) -> None:
        """After a failure, wait for the sums that are under way: all processes have begun them."""
        part, self._under_way = self._under_way, None
        if part is not None:
            with suppress(RankError):
                part.sums.wait()


def _or_zeros(tensor: TrainedTensor) -> None:
    """Give every leaf of ``tensor`` that waits for a gradient one of zeros, if this process has none for it."""
    for leaf in tensor.leaves():
        if leaf.requires_grad and leaf.grad is None:
            leaf.grad = torch.zeros(leaf.shape, dtype=leaf.grad_dtype, device=leaf.device)
