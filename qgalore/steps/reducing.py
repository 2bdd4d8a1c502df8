"""The steps of a walk's tensors: in several processes a block's gradients are summed while the next block works."""

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from ..errors import RankError
from ..lowrank.optimizer import LowRankOptimizer
from ..lowrank.tensors.base import TrainedTensor
from ..parallel.pending import Pending
from .blocks import Layout


class Steps:
    """What a walk calls for each part of a model whose gradients are complete in this process. With ``keep`` gradients
    stay, for the norm of all of them, and nothing steps here. With ``at_once`` the walk waits for the sums of each
    part, because its weights do not stay on the device.

    In a team the processes meet once for a part, so that one that has failed is heard of, and agree on which tensors
    have a gradient in any of them; a mixture's expert may have tokens in one alone. The sums then travel while the walk
    goes on. The part before this one, whose sums have arrived in the meantime, takes its step: so the gradients of two
    blocks exist at a time.
    """

    def __init__(self, optimizer: LowRankOptimizer, layout: Layout, *, keep: bool, at_once: bool = False) -> None:
        self.optimizer, self.layout, self.keep = optimizer, layout, keep
        self.at_once = at_once or optimizer.team.size == 1
        self._begun: set[str] = set()
        self._under_way: tuple[list[TrainedTensor], Pending] | None = None

    def __call__(self, name: str, parameters: list[nn.Parameter]) -> None:
        """``name`` and ``parameters`` as :func:`walk.walk` gives them."""
        begun = self._begin(name, self._asked(name, parameters))
        self.finish()
        self._under_way = begun
        if name == "prologue" or self.at_once:
            self.finish()

    def _asked(self, name: str, parameters: Iterable[nn.Parameter]) -> list[TrainedTensor]:
        """The tensors of a part, the same in every process, whichever of them has gradients."""
        outside, late = self.layout.outside, self.layout.late
        if name == "epilogue":
            parameters = [p for p in outside if id(p) not in late]
        elif name == "prologue":
            parameters = [*outside, *self.layout.blocks.parameters()]
        return [tensor for tensor in self.optimizer.tensors_of(parameters) if tensor.name not in self._begun]

    @torch.no_grad()
    def _begin(self, name: str, asked: list[TrainedTensor]) -> tuple[list[TrainedTensor], Pending]:
        """Begin to sum the gradients that some process has; the others add zeros."""
        team, tensors, sums, shares = self.optimizer.team, [], [], []
        held = team.any(f"the gradients of the {name}", [tensor.holds_gradient() for tensor in asked])
        for tensor, has in zip(asked, held, strict=True):
            if has:
                _or_zeros(tensor)
                more = tensor.to_sum(team)
                sums, shares = sums + more[0], shares + more[1]
                tensors.append(tensor)
        self._begun |= {tensor.name for tensor in tensors}
        return tensors, team.begin(sums, shares)

    def finish(self) -> None:
        """Wait for the sums that are under way; find the bases that are due from them, and step."""
        if self._under_way is None:
            return
        (tensors, pending), self._under_way = self._under_way, None
        pending.wait()
        for tensor in tensors:
            self.optimizer.prepare_summed(tensor)
        if not self.keep:
            self.optimizer.apply_tensors(tensors)

    def __enter__(self) -> "Steps":
        return self

    def __exit__(self, *_: Any) -> None:
        """After a failure, wait for the sums that are under way: all processes have begun them."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            with suppress(RankError):
                under_way[1].wait()


def _or_zeros(tensor: TrainedTensor) -> None:
    """Give ``tensor`` a gradient of zeros, if this process has none, in the leaf that would have received one."""
    if not tensor.holds_gradient():
        leaf = next(leaf for leaf in tensor.leaves() if leaf.requires_grad)
        leaf.grad = torch.zeros(leaf.shape, dtype=leaf.grad_dtype, device=leaf.device)
