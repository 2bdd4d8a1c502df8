"""A team on paper, for a plan of memory: one process stands for all."""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from .handing import Handed
from .pending import Note, Pending, Sum
from .team import Team

T = TypeVar("T")


class _Unsent(Pending):
    """What would travel is made, and stays where it is."""

    def _send(self, sent: Tensor, to: int | None) -> None:
        """Nothing."""


class PaperTeam(Team):
    """Does on the meta device what a process of a team does, but nobody is met and nothing is sent."""

    def _meeting(self, place: str, *words: int) -> list[list[int]]:
        return [[0, *words]]

    def tell(self, error: Exception) -> NoReturn:
        raise error

    def of_first(self, place: str, make: Callable[[], T]) -> T:
        return make()

    def receive_(self, place: str, tensors: list[Tensor]) -> None:
        """They are there."""

    def gather(self, place: str, value: Any) -> list[Any]:
        return [value] * self.size

    def leave_note(self, failed: bool, flags: list[bool]) -> Note:
        return Note(torch.tensor([failed, *flags], device="cpu"))

    def hear(self, note: Note, own: Exception | None) -> list[bool]:
        return note.words[1:].tolist()

    def begin(self, sums: Sequence[Sum]) -> Pending:
        return _Unsent().begin(sums)

    def hand_out(self, handed: Sequence[Handed]) -> None:
        """They are there."""
