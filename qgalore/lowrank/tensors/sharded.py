"""A layer's weight of which this process holds some rows (``parallel: shard``), and steps those."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...parallel import Team, shards
from ...parallel.pending import Share, Sum
from ...quant.blockwise import BLOCK
from ..inner.adam8bit import MIN_8BIT_SIZE
from ..layers.bases import Basis
from ..layers.linear import LowRankLinear
from ..subspace.refresh import RefreshOptions
from ..subspace.schedule import Schedule
from .projected import ProjectedTensor

INNERS = ("adamw8bit", "adamw")


@dataclass(frozen=True)
class _Rows:
    """What this process steps of a layer: its rows of the weight and of the scales, and the whole basis."""

    weight: Tensor
    weight_scale: Tensor | None
    right: Basis | None
    left: None = None


class ShardedTensor(ProjectedTensor):
    """Rows ``first_row`` … of a layer with no left basis. Every process computes Δ's whole gradient from its tokens.
    It is summed and scattered by rows: once a step where a walk says when, and for each micro-batch where hooks do.
    Moments and merge are those of the rows alone: row i of Δ moves row i of the weight. Bases are whole everywhere and
    are found as in any team. On the meta device, for a plan, the layer may be whole.
    """

    shared = True

    def __init__(
        self, name: str, index: int, module: LowRankLinear, schedule: Schedule, options: RefreshOptions
    ) -> None:
        super().__init__(name, index, module, schedule, options)
        team, scale = options.team, module.weight_scale
        rows_of = shards.local if shards.is_shared(module.weight) else partial(_planned_rows, team)
        self.mine = _Rows(rows_of(module.weight), None if scale is None else rows_of(scale), module.right)
        rows, self._rows = module.delta.shape[0] // team.size, None
        self.first_row, self.shape = team.rank * rows, torch.Size((rows, module.delta.shape[1]))

    def received(self, leaf: Tensor) -> None:
        """Sum Δ's gradient over the team, scatter it and add one's own rows to those of earlier micro-batches."""
        if leaf is self.module.delta and leaf.grad is not None:
            self.take(leaf.grad, True)
            leaf.grad = None

    def to_sum(self, team: Team) -> tuple[list[Sum], list[Share]]:
        """One's rows of Δ's gradient, if :meth:`received` has not got them; a whole gradient is summed and stays."""
        delta, shares = self.module.delta, []
        if delta.grad is not None:
            whole, delta.grad = delta.grad, None
            self._rows = team.room(whole, self.sent_in(whole))
            shares = [(whole, self._rows)]
        return super().to_sum(team)[0], shares

    def take(self, gradient: Tensor, own: bool) -> None:
        team = self.options.team
        if own:
            rows = team.scatter(f"the gradient of {self.name}", gradient)
            self._rows = rows if self._rows is None else self._rows.add_(rows)
        else:  # of a sum that all hold
            self._rows = shards.share(gradient, team.rank, team.size).clone()

    def gradient(self) -> Tensor | None:
        return self._rows

    def drop_gradient(self) -> None:
        super().drop_gradient()
        self._rows = None

    def traffic(self, gap: int, passes: int) -> dict[str, float]:
        """The weights are gathered forward and backward, and Δ's gradient is scattered, in each of the ``passes``."""
        module = self.module
        stored = [module.weight, *([] if module.weight_scale is None else [module.weight_scale])]
        sent = super().traffic(gap, passes)
        delta = sent.pop("all-reduce Δ gradients")
        gathered = 2.0 * passes * sum(tensor.nbytes for tensor in stored)
        return {"gather weights": gathered, "reduce-scatter Δ gradients": passes * delta} | sent

    def kept(self, name: str, value: Any) -> Any:
        """Moments and their blocks' scales as shared tensors; codes and counts, the same everywhere, as they are."""
        return shards.like(self.module.weight, value) if _by_rows(name, value) else value

    def restored(self, name: str, value: Any) -> Any:
        return shards.rows_of(self.module.weight, value).clone() if _by_rows(name, value) else value


def share_rows(blocks: Iterable[nn.Module], device: torch.device) -> None:
    """Leave of the stored weights and scales of the layers in ``blocks``, which a model calls one after the other, the
    rows of this process of a job alone; before the optimizer is made. All else, zero leaves included, stays whole.
    On the meta device memory is for ``models.streaming`` to give."""
    blocks, sharded = list(blocks), set()
    for layer in (m for block in blocks for m in block.modules() if isinstance(m, LowRankLinear)):
        sharded.add(layer.weight)
        if layer.weight_scale is not None:  # FSDP2 knows parameters only
            scale = nn.Parameter(layer.weight_scale, requires_grad=False)
            del layer.weight_scale
            layer.register_parameter("weight_scale", scale)
            sharded.add(scale)
    shards.shard(blocks, sharded, device)


def _planned_rows(team: Team, whole: Tensor) -> Tensor:
    return shards.share(whole.detach(), team.rank, team.size)


def _by_rows(name: str, value: Any) -> bool:
    return torch.is_tensor(value) and value.ndim > 0 and not name.startswith("qmap")


def shareable(name: str, module: LowRankLinear, inner: Any, size: int, limit: int = sys.maxsize) -> None:
    """Check that ``size`` processes can share the layer ``name`` under the optimizer ``inner``; a Δ of more than
    ``limit`` elements would step in parts.

    Its moments must be the same blocks of 256, or 4,096 values in fp32, as in one process, so that a checkpoint does
    not show how many there were. Raises :class:`ConfigError`.
    """
    rows, width = module.delta.shape
    problem = None
    if module.left is not None:
        problem = "its basis is on the left, so that every row moves by the whole of Δ; set lowrank.proj_type: right"
    elif rows % size:
        problem = f"its {rows} rows are no multiple of {size}; take another number of processes"
    elif inner not in INNERS:
        problem = f"train.optimizer is {inner!r}, whose state may not be one of rows; use one of {', '.join(INNERS)}"
    elif rows * width > limit:
        problem = f"its {rows} × {width} moments are more than {limit:,}, which step in parts; lower lowrank.rank"
    elif inner == "adamw8bit" and rows * width >= MIN_8BIT_SIZE:
        mine = rows // size * width
        if mine < MIN_8BIT_SIZE or mine % BLOCK:
            problem = (
                f"a share of its moments is {rows // size} × {width}, which must be at least {MIN_8BIT_SIZE:,} values "
                f"and whole blocks of {BLOCK}; take fewer processes, another lowrank.rank or train.optimizer: adamw"
            )
    if problem is not None:
        raise ConfigError(f"parallel: shard: {name} cannot be split over {size} processes: {problem}")
