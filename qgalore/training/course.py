"""The course of a run: what it trains, where it is, what it has written, and what it could return to."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ..files import checkpoint
from ..lowrank.optimizer import LowRankOptimizer
from ..parallel import ALONE, Team
from .keeping import Keeper
from .parts import Saving
from .position import Position
from .records import Records, Silence
from .tracking import NOWHERE, Tracking

Row = dict[str, Any]


class Course:
    """The state that training moves on and recovery moves back. In a team one process writes the records, and all write
    checkpoints together."""

    def __init__(
        self, model: nn.Module, optimizer: LowRankOptimizer, position: Position, saving: Saving, team: Team = ALONE
    ) -> None:
        self.model, self.optimizer, self.position = model, optimizer, position
        self.saving, self.team = saving, team
        kind = Records if team.leads else Silence
        self.metrics = kind(saving.folder / "metrics.jsonl")
        self.subspace = kind(saving.folder / "subspace.jsonl")
        self.updates = kind(saving.folder / "updates.jsonl")
        self.tracking: Tracking = NOWHERE
        self.keeper = Keeper(
            saving.folder / "checkpoints",
            save_every=saving.save_every,
            keep_last=saving.keep_last,
            keep_every=saving.keep_every,
            team=team,
            room=saving.room,
        )

    @property
    def best_step(self) -> int | None:
        """The step of the best checkpoint, if that is kept."""
        return self.position.best_step if self.saving.keep_best else None

    def save(self, beside: bool = False) -> Path:
        """Write a checkpoint of the present state; ``beside`` training, if there is room for a copy of it."""
        return self.keeper.save(
            self.position,
            self.model,
            self.optimizer,
            self.saving.run_state,
            best=self.best_step,
            for_rollback=self.saving.for_rollback,
            beside=beside,
        )

    def record(self, row: Row, refreshes: Sequence[Row] = (), updates: Sequence[Row] = ()) -> None:
        """Write the rows of a step, and send them to the trackers."""
        self.metrics.append([row])
        self.subspace.append(list(refreshes))
        self.updates.append(list(updates))
        self.tracking.send([row], refreshes, updates)

    def record_evaluation(self, row: Row) -> None:
        """The same for the row of an evaluation."""
        self.metrics.append_evaluation(row)
        self.tracking.send([row])

    def return_to(self, path: Path, state: dict[str, Any], **changes: Any) -> None:
        """Take the state of a checkpoint, with some fields of its position changed. What was written after it goes."""
        self.optimizer.skip()
        checkpoint.load_into(path, state, self.model, self.optimizer)
        self.optimizer.events.clear()
        self.optimizer.observations.clear()
        self.position = replace(Position.read(state["position"]), **changes)
        self.keeper.leave(self.position.step)
        for records in (self.metrics, self.subspace, self.updates):
            records.cut_back(self.position.step)
        self.tracking.go_back(self.position.step)

    def look_for_best(self) -> None:
        """A resumed run whose best checkpoint is gone, pruned on another course or never kept, cannot export it."""
        step = self.best_step
        if step is None:
            return
        if not self.team.of_first("the best checkpoint", self.keeper.path(step).exists):
            print(
                f"note: the best checkpoint so far, of step {step}, is gone; the best is sought from here on",
                flush=True,
            )
            self.position = replace(self.position, best_loss=None, best_step=None)

    def drain_events(self) -> list[Row]:
        """Refresh records of this step, with the step numbered as in metrics.jsonl (from 1)."""
        rows = [self._numbered(event) for event in self.optimizer.events]
        self.optimizer.events.clear()
        return rows

    def drain_observations(self) -> list[Row]:
        """The same of the updates that were looked at in this step."""
        rows = [self._numbered(observation.row()) for observation in self.optimizer.observations]
        self.optimizer.observations.clear()
        return rows

    def _numbered(self, row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "step": row["step"] + 1 - self.position.steps_before}
