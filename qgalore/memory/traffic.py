"""What the processes of a job send each other in a step: counted from the trained tensors, as the memory plan is."""

from collections.abc import Iterable

from ..lowrank.tensors.base import TrainedTensor

COLLECTIVES = (
    "all-reduce Δ gradients",
    "all-reduce dense gradients",
    "gather weights",
    "reduce-scatter Δ gradients",
    "all-reduce full gradients of refreshes",
    "broadcast bases",
)


def payload(tensors: Iterable[TrainedTensor], gap: int, micro_batches: int = 1) -> dict[str, float]:
    """Bytes of the tensors that an ordinary step reduces or broadcasts, by collective; and of layers whose rows are
    shared, what is gathered, forward and backward, and scattered for each of a process's ``micro_batches``.

    A layer's full gradient and fp32 basis travel once in ``gap`` steps, at most: a lazy schedule stretches its gap. The
    first step sends no full gradients. Of a mixture all experts count, as if each had tokens in every step. Meetings
    (24 bytes a process, some ten in a step; two for each tensor of an expert in a fused one) are left out.
    """
    sizes = dict.fromkeys(COLLECTIVES, 0.0)
    for tensor in tensors:
        for collective, size in tensor.traffic(gap, micro_batches).items():
            sizes[collective] += size
    return {name: size for name, size in sizes.items() if size}


def ring(size: float, processes: int, collective: str) -> float:
    """Bytes that a process sends (and receives as many) when ``size`` bytes go round a ring of ``processes``."""
    rounds = 2 if collective.startswith("all-reduce") else 1
    return rounds * size * (processes - 1) / processes
