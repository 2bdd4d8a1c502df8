"""The checkpoints that a run keeps: when one is due, what it holds, and which older ones go.

Where the host has room for a copy of the state, a checkpoint is written from that by a thread, and training goes on.
One is written at a time. Whoever asks for checkpoints, or saves again, waits for it first.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ..files import checkpoint
from ..lowrank.optimizer import LowRankOptimizer
from ..memory.plan import human
from ..parallel import ALONE, Team
from ..parallel.stages import Beside, Stages, complete
from .parts import Room, no_room
from .position import Position
from .records import human_time

PATIENCE = 30 * 60.0  # seconds of work that a run without save_every may lose
LONG = 5.0  # seconds that a checkpoint is written beside training, from which its end is announced
WRITING = "a checkpoint that is written beside training"


class Keeper:
    """Saves in ``folder``, every ``save_every`` steps or, without that, at least every ``PATIENCE`` seconds. ``clock``
    gives seconds; in a team the one of rank 0 decides. ``room()`` says what the host has for a copy of the state."""

    def __init__(
        self,
        folder: Path,
        *,
        save_every: int | None,
        keep_last: int,
        keep_every: int | None,
        team: Team = ALONE,
        clock: Callable[[], float] = time.monotonic,
        room: Room = no_room,
    ) -> None:
        self.folder, self.team, self.clock, self.room = folder, team, clock, room
        self.save_every, self.keep_last, self.keep_every = save_every, keep_last, keep_every
        self.saved_at = clock()
        self._writing: Beside | None = None
        self._locked = 0  # page-locked bytes that PyTorch keeps for the next copy
        self._said = False

    def due(self, step: int) -> bool:
        """Whether the state after ``step`` is to be saved by the count of steps, which is the same everywhere."""
        return self.save_every is not None and step % self.save_every == 0

    @property
    def overdue(self) -> bool:
        """Whether the clock here asks for a checkpoint: for rank 0 to tell the others."""
        return self.save_every is None and self.team.leads and self.clock() - self.saved_at >= PATIENCE

    def path(self, step: int) -> Path:
        return self.folder / checkpoint.name_for(step)

    def regular(self, best: int | None) -> list[int]:
        """The steps there, in order, that were not saved because of a clock or a signal: a run that was never stopped,
        or is slower, has them too. ``best`` is the best evaluation's step, where its checkpoint is kept."""
        found = (checkpoint.step_of(path) for path in checkpoint.steps_in(self.folder))
        return [step for step in found if step in (0, best) or self.due(step)]

    def newest(
        self, steps: Callable[[], list[int]] | None = None
    ) -> tuple[Path | None, dict[str, Any] | None, list[checkpoint.DamagedError]]:
        """The last usable checkpoint, its state and complaints about later ones; of ``steps()`` only, if given. In
        every process."""
        self.wait()
        found = self.team.of_first("the checkpoints", partial(checkpoint.steps_in, self.folder))
        if steps is not None:
            wanted = self.team.of_first("the checkpoints that count", steps)
            found = [path for path in found if checkpoint.step_of(path) in wanted]
        return checkpoint.newest_of(found, self.team)

    def save(
        self,
        position: Position,
        model: nn.Module,
        optimizer: LowRankOptimizer,
        run_state: dict[str, Any],
        best: int | None = None,
        for_rollback: bool = False,
        beside: bool = False,
    ) -> Path:
        """Write the state, each process its share, and delete what is too old: not the checkpoint of step ``best``, and
        ``for_rollback`` not the newest regular one. ``beside``: return when the state is copied, if there is room for
        that; :meth:`look` and :meth:`wait` then raise what fails later."""
        self.wait()
        state = {**run_state, "position": vars(position)}
        path = self.path(position.step)
        draft = checkpoint.begin(path, model, optimizer.state_dict(), state, self.team)
        stages = self._stages(path, draft, best, for_rollback)
        if beside and draft is not None and self._copied(draft):
            self._writing = Beside(WRITING, stages, self.team)
        else:
            complete(checkpoint.END, stages, self.team)
        self.saved_at = self.clock()
        return path

    def _stages(self, path: Path, draft: checkpoint.Draft | None, best: int | None, for_rollback: bool) -> Stages:
        started = time.monotonic()
        if draft is not None:
            yield from draft.stages()
        if self._writing is not None and (seconds := time.monotonic() - started) >= LONG:
            print(f"{path} is complete, {human_time(seconds)} after its step", flush=True)

        def kept() -> set[int]:
            return {best} - {None} | set(self.regular(best)[-1:] if for_rollback else ())

        yield from checkpoint.pruning(path, self.keep_last, self.keep_every, kept, self.team)

    def _copied(self, draft: checkpoint.Draft) -> bool:
        """Whether all processes have copied their share of ``draft``. If not, that is said once."""
        needed, room = draft.copy_bytes(), self.room()
        fits = room is not None and needed - self._locked <= room
        if self._all(fits) and self._all(draft.copy()):
            self._locked = max(self._locked, needed if draft.locked else 0)
            return True
        if not self._said:
            self._said = True
            free = "it is not known what is free" if room is None else f"{human(max(0, room))} are free for it"
            print(
                f"note: training waits while a checkpoint is written: a copy of what this process writes takes "
                f"{human(needed)} of host memory, and {free}",
                flush=True,
            )
        return False

    def _all(self, holds: bool) -> bool:
        return not self.team.meet("the copy of a checkpoint", note=not holds)

    def look(self) -> None:
        """Let a checkpoint that is being written go on to its next stage. Called by all processes after each step;
        raises :class:`ConfigError` if it could not be written."""
        if self._writing is not None:
            self._ended(self._writing.look)

    def wait(self) -> None:
        """Until no checkpoint is being written. Raises as :meth:`look` does."""
        if self._writing is not None:
            self._ended(self._writing.wait)

    def _ended(self, ask: Callable[[], Any]) -> None:
        """Forget what is being written if it has ended, well or not."""
        try:
            ended = ask() is not False
        except Exception:
            self._writing = None
            raise
        if ended:
            self._writing = None

    @contextmanager
    def to_the_end(self) -> Iterator[None]:
        """A block after which nothing is being written any more, nor after an error in it. Ctrl-C alone, when it must
        act at once, waits for nothing; what is half written then has no name yet."""
        try:
            with self.team.together("the end of the steps"):
                yield
        except Exception:
            try:
                self.wait()
            except Exception as other:
                print(f"note: {other}", flush=True)
            raise
        self.wait()

    def leave(self, step: int) -> None:
        """Set checkpoints after ``step`` aside: they are of a course that the run leaves."""
        self.wait()
        if self.team.leads:
            for path in checkpoint.set_aside(self.folder, step):
                print(f"a later checkpoint of the course left is kept as {path}", flush=True)
        self.team.meet("the checkpoints of the course left")
