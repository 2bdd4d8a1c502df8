"""Sums over the processes of a job that are on their way while other work goes on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from .telling import reaching

SMALL = 1 << 16  # elements below which tensors travel together
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # its name before 2.13

Sum = tuple[Tensor, torch.dtype]  # a tensor that is to become its sum over the processes, and the dtype it travels in
Share = tuple[Tensor, Tensor]  # a tensor, and the memory for this process's rows of its sum


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

    def begin(self, sums: Sequence[Sum], shares: Sequence[Share]) -> "Pending":
        """Send them on their way; small ``sums`` of one dtype travel together. The rows of a share are those of its
        tensor in the dtype of the memory for them."""
        small: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor, dtype in sums:
            if tensor.numel() < SMALL:
                small.setdefault((dtype, tensor.device), []).append(tensor)
                continue
            sent = tensor.to(dtype).contiguous()
            self._send(partial(dist.all_reduce, sent))
            if sent is not tensor:
                self._arrivals.append((sent.view(-1), [tensor]))
        for (dtype, _), group in small.items():
            sent = torch.cat([tensor.to(dtype).reshape(-1) for tensor in group])
            self._send(partial(dist.all_reduce, sent))
            self._arrivals.append((sent, group))
        for tensor, mine in shares:
            self._send(partial(_reduce_scatter, mine, tensor.to(mine.dtype).contiguous()))
        return self

    def _send(self, collective: Callable[..., Any]) -> None:
        with reaching():
            self._works.append(collective(async_op=True))
