"""Weights that are split over processes by rows, and the one process that steps each of them (``parallel: shard``).

Between two turns of its block a process keeps its rows of the block's stored weights, scales and bases. In a turn the
block is whole in every process. Each matrix has an *owner*, who alone keeps its optimizer state. It gets the sum of its
gradients, finds its bases, steps it in the gathered block as a single process does, and hands the rows out. So every
rule works, whatever rows it looks at, and the bits are those of one process.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from ...parallel import Team, shards
from ..layers.bases import Basis
from ..layers.linear import LowRankLinear
from .base import TrainedTensor


def split_rows(blocks: Iterable[nn.Module], device: torch.device) -> None:
    """Leave of what the low-rank layers in ``blocks`` store, which a model calls one after the other, the rows of this
    process of a job alone; before the optimizer is made. All else, zero leaves included, stays whole. On the meta
    device memory is for ``models.streaming`` to give."""
    blocks = list(blocks)
    shards.shard(blocks, {parameter for block in blocks for parameter in _stored(block)}, device)


def _stored(block: nn.Module) -> list[nn.Parameter]:
    """The weights, scales and bases in ``block``, all as parameters, since FSDP2 knows no buffers."""
    found = []
    for module in block.modules():
        keys = ("weight", "weight_scale") if isinstance(module, LowRankLinear) else ("codes", "scale")
        if isinstance(module, (LowRankLinear, Basis)):
            found += [_as_parameter(module, key) for key in keys if getattr(module, key) is not None]
    return found


def _as_parameter(module: nn.Module, key: str) -> nn.Parameter:
    tensor = getattr(module, key)
    if not isinstance(tensor, nn.Parameter):
        delattr(module, key)
        module.register_parameter(key, nn.Parameter(tensor, requires_grad=False))
    return getattr(module, key)


def deal(tensors: Sequence[TrainedTensor], team: Team) -> None:
    """Give each matrix among ``tensors`` an owner in ``team``, so that what they keep of the optimizer's state is even:
    the largest first, each to whom least has gone to. Vectors have none, and every process steps them.

    Call it between their making and the optimizer's. Of the state that rules have made, owners alone keep the memory.
    """
    load = [0] * team.size
    costs = {tensor.name: 2 * tensor.shape.numel() + sum(v.nbytes for v in tensor.tensors().values()) for tensor in tensors}
    for tensor in sorted(tensors, key=lambda tensor: -costs[tensor.name]):
        if tensor.stored.ndim < 2:
            continue
        tensor.owner = load.index(min(load))
        load[tensor.owner] += costs[tensor.name]
        set_down(tensor)
        if tensor.owner == team.rank:
            take_up(tensor)


def set_down(tensor: TrainedTensor) -> None:
    """Give the memory of its rule's state back, which is zero as long as it has not stepped. Shapes and dtypes stay."""
    for value in tensor.tensors().values():
        value.untyped_storage().resize_(0)


def take_up(tensor: TrainedTensor) -> None:
    """The inverse of :func:`set_down`."""
    for value in tensor.tensors().values():
        value.untyped_storage().resize_(value.nbytes)
        value.zero_()
