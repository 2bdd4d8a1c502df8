"""The processes of a job, for a plan: nobody is met, but what is made to be sent is made."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor

from ..parallel import Team
from ..parallel.pending import Pending, Share, Sum

T = TypeVar("T")


class _Unsent(Pending):
    """Sums that stay what they are."""

    def _reduce(self, tensor: Tensor) -> None:
        """Nothing."""


class TeamOnPaper(Team):
    """Process ``rank`` of ``size``, which all do as this one does."""

    def meet(self, place: str, *, digest: float = 0.0, note: int = 0) -> int:
        return note

    def of_first(self, place: str, make: Callable[[], T]) -> T:
        return make()

    def total(self, place: str, value: float) -> float:
        return value

    def any(self, place: str, flags: list[bool]) -> list[bool]:
        return flags

    def begin(self, sums: Sequence[Sum], shares: Sequence[Share] = ()) -> Pending:
        """The memory for ``shares`` is there; what travels in another dtype, or together, is made."""
        return _Unsent().begin(sums, []) if self.size > 1 else Pending()

    def receive_(self, place: str, tensors: list[Tensor]) -> None:
        """Nothing: the shapes are here."""
