"""What the processes of a job send each other in a step: counted from the trained tensors, as the memory plan is."""

from collections.abc import Iterable

from ..lowrank.tensors.base import TrainedTensor

COLLECTIVES = (
    "gather blocks",
    "gather matrices",
    "all-reduce Δ gradients",
    "reduce Δ gradients",
    "all-reduce dense gradients",
    "reduce dense gradients",
    "all-reduce full gradients of refreshes",
    "reduce full gradients of refreshes",
    "hand out rows",
    "broadcast matrices",
    "broadcast bases",
)


def payload(tensors: Iterable[TrainedTensor], gap: int) -> dict[str, float]:
    """Bytes of the tensors that an ordinary step sends, by collective. Blocks that are split are gathered twice in it,
    forward and backward, whatever the number of micro-batches is.

    A layer's full gradient and new basis travel once in ``gap`` steps, at most: a lazy schedule stretches its gap. The
    full gradients of a first step are left out. Of a mixture all experts count, since those without tokens send zeros.
    Meetings, what owners tell of refreshes, and the notes of blocks are left out: they are some bytes for each tensor.
    """
    sizes = dict.fromkeys(COLLECTIVES, 0.0)
    for tensor in tensors:
        for collective, size in tensor.traffic(gap).items():
            sizes[collective] += size
    return {name: size for name, size in sizes.items() if size}
