"""Sums over the processes of a job that are on their way while other work goes on."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from .telling import reaching

SMALL = 1 << 16  # elements below which tensors travel together


@dataclass(frozen=True)
class Sum:
    """``tensor`` is to become its sum over the processes, and travels in ``dtype``: in every process, or in the one
    ``to`` which it goes alone. Elsewhere it then holds anything."""

    tensor: Tensor
    dtype: torch.dtype
    to: int | None = None


@dataclass
class Note:
    """Words of this process on their way, which become the largest of every process; see ``Team.leave_note``."""

    words: Tensor
    work: Any = None


@dataclass
class Pending:
    """What was begun together. The tensors must be left alone until :meth:`wait` returns. All processes begin the same
    things in the same order."""

    _works: list[Any] = field(default_factory=list)
    _arrivals: list[tuple[Tensor, list[Tensor]]] = field(default_factory=list)  # what travels, and where it belongs

    def wait(self) -> None:
        """Until every sum is where it belongs."""
        works, self._works = self._works, []
        arrivals, self._arrivals = self._arrivals, []
        for work in works:
            with reaching():
                work.wait()
        for sent, tensors in arrivals:
            for tensor, part in zip(tensors, sent.split([t.numel() for t in tensors]), strict=True):
                tensor.copy_(part.view(tensor.shape))

    def begin(self, sums: Sequence[Sum]) -> "Pending":
        """Send them on their way; small ones of one dtype that go to the same place travel together."""
        small: dict[tuple[torch.dtype, int | None, torch.device], list[Tensor]] = {}
        for one in sums:
            if one.tensor.numel() < SMALL:
                small.setdefault((one.dtype, one.to, one.tensor.device), []).append(one.tensor)
                continue
            sent = one.tensor.to(one.dtype).contiguous()
            self._send(sent, one.to)
            if sent is not one.tensor:
                self._arrivals.append((sent.view(-1), [one.tensor]))
        for (dtype, to, _), group in small.items():
            sent = torch.cat([tensor.to(dtype).reshape(-1) for tensor in group])
            self._send(sent, to)
            self._arrivals.append((sent, group))
        return self

    def _send(self, sent: Tensor, to: int | None) -> None:
        collective = dist.all_reduce if to is None else partial(dist.reduce, dst=to)
        with reaching():
            self._works.append(collective(sent, async_op=True))
