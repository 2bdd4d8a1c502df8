"""The processes of one training job and what they do together, over ``torch.distributed``.

Most operations begin with a *meeting*: each process says where it is, or that it failed. A process that waits for a
gradient therefore learns of an error elsewhere instead of waiting for ever, and processes that came to different
places, or no longer hold the same numbers, stop with both named. A meeting is one collective of 24 bytes a process, on
the CPU. A number to be summed and some flags travel in it.

Where everything that comes next is known beforehand, a *note* does instead, for which nobody waits when it is left. A
process that has failed says so in its next note, and goes on taking part until the others have heard it.

In one process (:data:`ALONE`) all of it does nothing.
"""

import hashlib
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache, reduce
from operator import or_
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from .. import errors
from ..errors import RankError
from .handing import Handed, hand_out
from .pending import Note, Pending, Sum
from .telling import is_told, kind_of, reaching, told

FAILED = 0
WORD = 63  # flags that travel in a meeting
PATIENCE = timedelta(minutes=30)  # the longest work of one process that the others wait for: a corpus, an evaluation
T = TypeVar("T")


@dataclass
class Said:
    """What this process says when it leaves a block with the others, and then the largest ``note`` of all; see
    :meth:`Team.meet`."""

    digest: float = 0.0
    note: int = 0


@dataclass(frozen=True)
class Team:
    """Process ``rank`` of ``size``. Rank 0, which ``leads``, alone prints and writes files, but for checkpoints. Rank
    ``first`` is the one whose values all take (:meth:`of_first`, :meth:`receive_`)."""

    rank: int = 0
    size: int = 1
    first: int = 0

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def led_by(self, rank: int) -> "Team":
        """The team, in which ``rank`` decides."""
        return self if rank == self.first else replace(self, first=rank)

    def deal(self, items: Sequence[T]) -> list[T]:
        """This process's share of ``items``: one to each in turn, the first to rank 0."""
        return list(items[self.rank :: self.size])

    def meet(self, place: str, *, digest: float = 0.0, note: int = 0) -> int:
        """Wait until all are at ``place``; returns the largest ``note`` (≥ 0).

        Raises what :meth:`tell` says on every process if one has failed, and :class:`RankError` if they are at
        different places or bring another ``digest``.
        """
        if self.size == 1:
            return note
        rows = self._meeting(place, _bits(digest), note)
        if len({row[1] for row in rows}) > 1:
            found = [_of_bits(row[1]) for row in rows]
            raise told(
                RankError(
                    f"the processes hold different numbers at: {place} ({', '.join(f'{x!r}' for x in found)}): the "
                    "sums that they received differ. Go on with --resume auto; if it comes again, use like devices"
                )
            )
        return max(row[2] for row in rows)

    def _meeting(self, place: str, *words: int) -> list[list[int]]:
        """The two ``words`` of every rank, behind the place, once all are there."""
        return self._all_there(place, self._begin_rows([_number(place.encode()) + 1, *words])())

    def _all_there(self, place: str, rows: list[list[int]]) -> list[list[int]]:
        """The ``rows`` of all, if nobody has failed and all are at ``place``."""
        if any(row[0] == FAILED for row in rows):
            self._raise_the_first(None)
        if len({row[0] for row in rows}) > 1:
            places: list[Any] = [None] * self.size
            with reaching():
                dist.all_gather_object(places, place)
            other = next(rank for rank, row in enumerate(rows) if row[0] != rows[0][0])
            raise told(
                RankError(
                    f"rank 0 came to: {places[0]}; rank {other} to: {places[other]}. They must take the same way: a "
                    "layer that some micro-batches do not use, unless it is an expert of a mixture that was converted, "
                    "is trained in several processes by layer-major steps alone (train.order: layer_major)"
                )
            )
        return rows

    def _begin_rows(self, mine: list[int]) -> Callable[[], list[list[int]]]:
        row = torch.tensor(mine, dtype=torch.int64, device="cpu")
        rows = [torch.empty_like(row) for _ in range(self.size)]
        with reaching():
            work = dist.all_gather(rows, row, async_op=True)

        def arrived() -> list[list[int]]:
            with reaching():
                work.wait()
            return [part.tolist() for part in rows]

        return arrived

    def tell(self, error: Exception) -> None:
        """Raise ``error``, or that of a lower rank that failed as well, here and in all other processes.

        An error of ours keeps its class there, so that all decide alike; any other becomes :class:`RankError`.
        """
        if self.size > 1 and not is_told(error):
            try:
                self._begin_rows([FAILED, 0, 0])()
            except RankError:  # nobody is left to be told
                raise told(error) from None
            self._raise_the_first(error)
        raise error

    def _raise_the_first(self, own: Exception | None) -> None:
        said: list[Any] = [None] * self.size
        with reaching():
            dist.all_gather_object(said, None if own is None else (type(own).__name__, kind_of(own), str(own)))
        rank = next(number for number, words in enumerate(said) if words is not None)
        name, kind, message = said[rank]
        if own is not None and (rank == self.rank or type(own).__name__ == name):
            raise told(own)
        raise told(
            getattr(errors, kind)(f"rank {rank}: {message if kind != RankError.__name__ else name + ': ' + message}")
        )

    @contextmanager
    def together(self, place: str) -> Iterator[Said]:
        """A block that all leave alike: at ``place``, or with the same error. What it writes into the object that it
        is given goes to the others with its end."""
        try:
            said = Said()
            yield said
            said.note = self.meet(place, digest=said.digest, note=said.note)
        except Exception as error:
            self.tell(error)

    def of_first(self, place: str, make: Callable[[], T]) -> T:
        """What ``make()`` gives on rank ``first``, on every rank; only that calls it. The value must pickle."""
        if self.size == 1:
            return make()
        value = [make() if self.rank == self.first else None]
        self.meet(place)
        with reaching():
            dist.broadcast_object_list(value, src=self.first)
        return value[0]

    def gather(self, place: str, value: T) -> list[T]:
        """``value`` of every rank, in their order, on every rank. It must pickle."""
        if self.size == 1:
            return [value]
        self.meet(place)
        found: list[Any] = [None] * self.size
        with reaching():
            dist.all_gather_object(found, value)
        return found

    def after_first(self, place: str, work: Callable[[], T]) -> T:
        """``work()`` on every rank, on rank 0 before the others: what it leaves on the disk is there for them."""
        if self.leads:
            done = work()
        self.meet(place)
        return done if self.leads else work()

    def total(self, place: str, value: float) -> float:
        """The sum of ``value`` over the ranks, the same bits on each: added in their order. An int stays one."""
        return self.total_and_any(place, value, [])[0]

    def begin_total(self, place: str, count: int) -> Callable[[], int]:
        """:meth:`total` of a whole number that is asked for later: nobody waits before the function that is returned is
        called, which some may do without others."""
        if self.size == 1:
            return lambda: count
        rows = self._begin_rows([_number(place.encode()) + 1, count, 0])
        return cache(lambda: sum(row[1] for row in self._all_there(place, rows())))

    def total_and_any(self, place: str, value: float, flags: list[bool]) -> tuple[float, list[bool]]:
        """:meth:`total` and :meth:`any` in one meeting, unless there are more than :data:`WORD` flags."""
        if self.size == 1:
            return value, flags
        counts, fits = isinstance(value, int), len(flags) <= WORD
        mine = sum(1 << bit for bit, flag in enumerate(flags) if flag and fits)
        rows = self._meeting(place, value if counts else _bits(value), mine)
        total = sum(row[1] if counts else _of_bits(row[1]) for row in rows)
        held = reduce(or_, (row[2] for row in rows))
        return total, [bool(held >> bit & 1) for bit in range(len(flags))] if fits else self.any(place, flags)

    def lowest(self, place: str, holds: bool) -> int | None:
        """The lowest rank that ``holds`` something, None if none does."""
        note = self.meet(place, note=self.size - self.rank if holds else 0)
        return self.size - note if note else None

    def any(self, place: str, flags: list[bool]) -> list[bool]:
        """For each flag, whether a rank has set it. If all ranks have the same ones, or they are up to 63, nothing is
        sent but a meeting."""
        if self.size == 1 or len(flags) <= WORD:
            return self.total_and_any(place, 0, flags)[1]
        rows = self._meeting(place, _number(bytes(flags)), len(flags))
        if all(row[1:] == rows[0][1:] for row in rows):
            return flags
        found = torch.tensor(flags, dtype=torch.uint8, device="cpu")
        with reaching():
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.bool().tolist()

    def leave_note(self, failed: bool, flags: list[bool]) -> Note:
        """Begin to tell all whether this process has ``failed``, and its ``flags``. Nobody is waited for."""
        words = torch.tensor([failed, *flags], dtype=torch.uint8, device="cpu")
        with reaching():
            return Note(words, dist.all_reduce(words, dist.ReduceOp.MAX, async_op=True))

    def hear(self, note: Note, own: Exception | None) -> list[bool]:
        """For each flag of a ``note``, whether a process has set it. If one has failed, raises what :meth:`tell` says;
        ``own``: the error of this process."""
        with reaching():
            note.work.wait()
        if note.words[0]:
            self._raise_the_first(own)
        return note.words[1:].bool().tolist()

    def begin(self, sums: Sequence[Sum]) -> Pending:
        """Begin to replace the tensors of ``sums`` by their sums over the ranks.

        Nobody is met: all must be sure to come here.
        """
        return Pending() if self.size == 1 else Pending().begin(sums)

    def hand_out(self, handed: Sequence[Handed]) -> None:
        """Give every rank what it keeps of tensors that one of them has changed. Nobody is met, as in :meth:`begin`, so
        one that fails here must end: the others wait for what it would send."""
        if self.size > 1:
            try:
                hand_out(handed, self.rank)
            except Exception as error:
                told(error)
                raise

    def sum_(self, place: str, tensors: list[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks, in its own dtype; small ones of a dtype travel in one."""
        if self.size > 1:
            self.meet(place)
            self.add_(tensors)

    def add_(self, tensors: list[Tensor]) -> None:
        """:meth:`sum_` where nobody is met, as in :meth:`begin`."""
        self.begin([Sum(tensor, tensor.dtype) for tensor in tensors]).wait()

    def receive_(self, place: str, tensors: list[Tensor]) -> None:
        """Replace each tensor by that of rank ``first``."""
        if self.size == 1:
            return
        self.meet(place)
        for tensor in tensors:
            with reaching():
                dist.broadcast(tensor, src=self.first)


ALONE = Team()


def _bits(value: float) -> int:
    """The bits of ``value`` as a whole number."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


def _of_bits(bits: int) -> float:
    return struct.unpack("<d", struct.pack("<q", bits))[0]


def _number(words: bytes) -> int:
    """A number of 56 bits that other words hardly share."""
    return int.from_bytes(hashlib.blake2b(words, digest_size=7).digest(), "little")
