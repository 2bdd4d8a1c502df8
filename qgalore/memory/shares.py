"""What one card of several keeps and holds, where blocks are split by rows and each matrix has one owner.

Counted from a converted model on the meta device and its trained tensors, as they are in one process.
"""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..lowrank.layers.linear import LowRankLinear
from ..lowrank.tensors.base import SHARED_STATE, TrainedTensor
from ..models.compiling import blocks_of
from .resident import make_states
from .wire import Cards

GATHERED = 3  # blocks that are whole at a time: the one before, which is stepped, the one at work and the next one
REDUCED = 2  # blocks whose gradients are there at a time: the one that works, and the one whose sums are under way


@dataclass(frozen=True)
class Share:
    """Bytes of the fullest card: ``blocks``: its rows of what the blocks store; ``whole``: what each card holds of the
    model beside; ``state``: of the optimizer, for the matrices that it owns and for all vectors; ``gathered``: whole
    blocks at work; ``gradients``: at work in an ordinary step, and ``first`` in the first one, in which every basis is
    due. ``owners``: how many cards own a matrix."""

    blocks: int
    whole: int
    state: int
    gathered: int
    gradients: int
    first: int
    owners: int

    @property
    def kept(self) -> int:
        """Between two steps."""
        return self.blocks + self.whole + self.state

    @property
    def at_work(self) -> int:
        """The most that the split adds in a step. Activations and temporaries come on top."""
        return self.gathered + max(self.gradients, self.first)


def share(model: nn.Module, tensors: Sequence[TrainedTensor], cards: Cards) -> Share:
    """The share of a converted ``model`` on the meta device and its ``tensors``, made for one process."""
    make_states(tensors)
    blocks = blocks_of(model)
    stored = [[value for layer in _layers(block) for value in _stored(layer)] for block in blocks]
    split = {id(value) for part in stored for value in part} if cards.shards > 1 else set()
    everything = {id(value): value for value in (*model.parameters(), *model.buffers())}
    owned = [_state(tensor) for tensor in tensors if tensor.group != "vector"]
    loads = spread(owned, cards.size)
    largest = max((sum(value.nbytes for value in part) for part in stored), default=0)
    inside = [_within(block, tensors) for block in blocks]
    return Share(
        blocks=sum(_rows(everything[key], cards.shards) for key in split),
        whole=sum(value.untyped_storage().nbytes() for key, value in everything.items() if key not in split),
        state=max(loads) + sum(_state(tensor) for tensor in tensors if tensor.group == "vector"),
        gathered=GATHERED * largest if cards.shards > 1 else 0,
        gradients=REDUCED * max(sum(_gradient(tensor, False) for tensor in part) for part in inside),
        first=REDUCED * max(sum(_gradient(tensor, True) for tensor in part) for part in inside),
        owners=sum(load > 0 for load in loads),
    )


def spread(sizes: Iterable[int], cards: int) -> list[int]:
    """The bytes of each of so many ``cards``: the largest of ``sizes`` first, each to the card that has least."""
    loads = [0] * cards
    for size in sorted(sizes, reverse=True):
        heapq.heapreplace(loads, loads[0] + size)
    return loads


def busiest(blocks: Sequence[nn.Module], tensors: Sequence[TrainedTensor], cards: int) -> float:
    """How many times as much as the mean card the busiest owner of a block's matrices hands out, over all ``blocks``.
    The largest matrix is one card's, and with few cards each owns an even part."""
    sizes = [[t.stored.nbytes for t in _within(block, tensors) if t.group != "vector"] for block in blocks]
    whole = sum(map(sum, sizes))
    return sum(max(cards * max(part, default=0), sum(part)) for part in sizes) / whole if whole else 1.0


def _layers(block: nn.Module) -> list[LowRankLinear]:
    return [module for module in block.modules() if isinstance(module, LowRankLinear)]


def _stored(layer: LowRankLinear) -> list[Tensor]:
    """What is split by rows: weight, scales, and bases whose rank is fixed."""
    found = [layer.weight, layer.weight_scale]
    if layer.max_rank is None:
        found += [value for basis in (layer.left, layer.right) if basis is not None for value in basis.buffers()]
    return [value for value in found if value is not None]


def _rows(value: Tensor, shards: int) -> int:
    """Bytes of the first process's rows, which are as many as any other's, as FSDP2 splits them."""
    return -(-value.shape[0] // shards) * (value.nbytes // value.shape[0])


def _state(tensor: TrainedTensor) -> int:
    """Bytes that a tensor's owner keeps: moments, momentum and master, without what all tensors share."""
    parts = [(name, value) for part in tensor.parts for name, value in part.state().items()]
    moments = [value for name, value in parts if isinstance(value, Tensor) and not name.startswith(SHARED_STATE)]
    return sum(value.nbytes for value in (*moments, *tensor.tensors().values()))


def _within(block: nn.Module, tensors: Sequence[TrainedTensor]) -> list[TrainedTensor]:
    inside = {id(parameter) for parameter in block.parameters()}
    return [tensor for tensor in tensors if any(id(leaf) in inside for leaf in tensor.leaves())]


def _gradient(tensor: TrainedTensor, due: bool) -> int:
    """Bytes of a tensor's gradient in a step, in which its basis is ``due`` or not."""
    whole = due and tensor.projected
    leaves = [leaf for leaf in tensor.leaves() if tensor.keeps_whole or tensor.is_whole(leaf) == whole]
    return sum(leaf.numel() * (leaf.grad_dtype or leaf.dtype).itemsize for leaf in leaves)
