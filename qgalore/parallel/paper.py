"""A team on paper, for a plan of memory: one process stands for all."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor

from .pending import Pending, Share, Sum
from .team import Team

T = TypeVar("T")


class _Unsent(Pending):
    """What would travel is made, and stays where it is."""

    def _send(self, collective: Callable[..., Any]) -> None:
        """Nothing."""


class PaperTeam(Team):
    """Does on the meta device what a process of a team does, but nobody is met and nothing is sent."""

    def meet(self, place: str, *, digest: float = 0.0, note: int = 0) -> int:
        return note

    def any(self, place: str, flags: list[bool]) -> list[bool]:
        return flags

    def total(self, place: str, value: float) -> float:
        return value

    def of_first(self, place: str, make: Callable[[], T]) -> T:
        return make()

    def receive_(self, place: str, tensors: list[Tensor]) -> None:
        """They are there."""

    def gather(self, place: str, value: Any) -> list[Any]:
        return [value] * self.size

    def begin(self, sums: Sequence[Sum], shares: Sequence[Share] = ()) -> Pending:
        return _Unsent().begin(sums, shares)
