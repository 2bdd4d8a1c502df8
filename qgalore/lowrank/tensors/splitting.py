"""Weights that are split over processes by rows, and the one process that steps each of them (``parallel: shard``).

Between two turns of its block a process keeps its rows of the block's stored weights, scales and bases. In a turn the
block is whole in every process. Each matrix has an *owner*, who alone keeps its optimizer state. It gets the sum of its
gradients, finds its bases, steps it in the gathered block as a single process does, and hands the rows out. So every
rule works, whatever rows it looks at, and the bits are those of one process.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...parallel import Team, apart, shards
from ..inner.checked import Factory
from ..layers.linear import LowRankLinear
from ..subspace import ranks
from .base import TrainedTensor
from .places import Place, places

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def split_rows(blocks: Iterable[nn.Module], mesh: "DeviceMesh", on_host: bool = False) -> None:
    """Leave of what the low-rank layers in ``blocks`` store, which a model calls one after the other, the rows of this
    process in ``mesh`` alone; before the optimizer is made. All else, zero leaves included, stays whole. On the meta
    device memory is for ``models.streaming`` to give. ``on_host``: the rows wait in host memory."""
    blocks = list(blocks)
    shards.shard(blocks, {_as_parameter(place) for block in blocks for place in places_in(block)}, mesh, on_host)


def split_outside(model: nn.Module, blocks: Iterable[nn.Module], mesh: "DeviceMesh") -> None:
    """The same of the matrices that train outside of ``blocks``, embeddings and head above all; once they are
    filled."""
    apart.set_apart(model, matrices_outside(model, blocks), mesh)


def matrices_outside(model: nn.Module, blocks: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The matrices that train in full outside of ``blocks``, each once."""
    inside = {id(p) for block in blocks for p in block.parameters()}
    layers = (module for module in model.modules() if isinstance(module, LowRankLinear))
    inside |= {id(leaf) for layer in layers for leaf in layer.leaves().values()}
    return [p for p in model.parameters() if p.requires_grad and p.ndim > 1 and id(p) not in inside]


def places_in(block: nn.Module) -> list[Place]:
    """Where ``block`` stores what is split: weights, scales, and bases. Bases whose rank is free to move are whole
    everywhere, since FSDP2 has no rows for a size that changes."""
    found = []
    for module in block.modules():
        if isinstance(module, LowRankLinear):
            sides = [side for side in (module.left, module.right) if side is not None and module.max_rank is None]
            found += places(module, "weight", "weight_scale")
            found += [place for side in sides for place in places(side, "codes", "scale")]
    return found


def _as_parameter(place: Place) -> nn.Parameter:
    """The tensor there, as FSDP2 knows it: no buffer."""
    module, key = place.module, place.key
    tensor = getattr(module, key)
    if not isinstance(tensor, nn.Parameter):
        delattr(module, key)
        module.register_parameter(key, nn.Parameter(tensor, requires_grad=False))
    return getattr(module, key)


def deal(tensors: Sequence[TrainedTensor], team: Team, factory: Factory) -> list[int]:
    """Give each matrix among ``tensors`` an owner in ``team``, so that what they keep of the optimizer's state is even:
    the largest first, each to whom least has gone to. Vectors have none, and every process steps them.

    Call it between their making and the optimizer's, whose ``factory`` makes inner optimizers. Of the state that rules
    have made, owners alone keep the memory. Returns the bytes of state that each process keeps of matrices.
    """
    load = [0] * team.size
    matrices = [tensor for tensor in tensors if tensor.stored.ndim > 1]
    moment_bytes = ranks.measured_bytes(factory, tensors[0].leaves()[0].device)
    costs = {tensor.name: _state_bytes(tensor, moment_bytes) for tensor in matrices}
    for tensor in sorted(matrices, key=lambda tensor: -costs[tensor.name]):
        tensor.owner = load.index(min(load))
        load[tensor.owner] += costs[tensor.name]
        set_down(tensor)
        tensor.elsewhere = tensor.owner != team.rank
        if not tensor.elsewhere:
            take_up(tensor)
    return load


def _state_bytes(tensor: TrainedTensor, moment_bytes: Callable[[torch.Size], int]) -> int:
    """What its owner keeps: the state of the inner optimizer and of its rule."""
    rows, size = tensor.shape[0], tensor.shape.numel()
    moments = moment_bytes(torch.Size((rows, size // rows))) if size else 0
    return moments + sum(value.nbytes for value in tensor.tensors().values())


def set_down(tensor: TrainedTensor) -> None:
    """Give the memory of its rule's state back, which is zero as long as it has not stepped. Shapes and dtypes stay."""
    for value in _state(tensor):
        value.untyped_storage().resize_(0)


def take_up(tensor: TrainedTensor) -> None:
    """The inverse of :func:`set_down`."""
    for value in _state(tensor):
        value.untyped_storage().resize_(value.nbytes)
        value.zero_()


def _state(tensor: TrainedTensor) -> list[Tensor]:
    """Of its rule, where it has memory."""
    return [value for value in tensor.tensors().values() if not value.is_meta]
