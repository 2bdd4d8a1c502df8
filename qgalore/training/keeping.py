"""The checkpoints that a run keeps: when one is due, what it holds, and which older ones go."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ..files import checkpoint
from ..lowrank.optimizer import LowRankOptimizer
from ..parallel import ALONE, Team
from .position import Position

PATIENCE = 30 * 60.0  # seconds of work that a run without save_every may lose


class Keeper:
    """Saves in ``folder``, every ``save_every`` steps or, without that, at least every ``PATIENCE`` seconds. ``clock``
    gives seconds; in a team the one of rank 0 decides."""

    def __init__(
        self,
        folder: Path,
        *,
        save_every: int | None,
        keep_last: int,
        keep_every: int | None,
        team: Team = ALONE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder, self.team, self.clock = folder, team, clock
        self.save_every, self.keep_last, self.keep_every = save_every, keep_last, keep_every
        self.saved_at = clock()

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
    ) -> Path:
        """Write the state, each process its share, and delete what is too old: not the checkpoint of step ``best``, and
        ``for_rollback`` not the newest regular one."""
        state = {**run_state, "position": vars(position)}
        path = checkpoint.save(self.path(position.step), model, optimizer.state_dict(), state, self.team)
        kept = {best} - {None} | set(self.regular(best)[-1:] if for_rollback else ())
        checkpoint.prune(path, self.keep_last, self.keep_every, kept, self.team)
        self.saved_at = self.clock()
        return path

    def leave(self, step: int) -> None:
        """Set checkpoints after ``step`` aside: they are of a course that the run leaves."""
        if self.team.leads:
            for path in checkpoint.set_aside(self.folder, step):
                print(f"a later checkpoint of the course left is kept as {path}", flush=True)
        self.team.meet("the checkpoints of the course left")
