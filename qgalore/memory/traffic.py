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


def payload(tensors: Iterable[TrainedTensor], gap: int, passes: int = 1) -> dict[str, float]:
    """Bytes of the tensors that an ordinary step reduces or broadcasts, by collective; and of layers whose rows are
    shared, what is gathered and scattered in each of its ``passes`` through the model and back: a layer-major step is
    one, a batch-major one has as many as a process has micro-batches.

    A layer's full gradient and fp32 basis travel once in ``gap`` steps, at most: a lazy schedule stretches its gap. The
    full gradients of a first step are left out. Of a mixture all experts count, since those without tokens send zeros.
    Meetings (24 bytes a process, six in a layer-major step and as many for each refresh) are left out, and so are
    the notes of blocks, of a byte for each tensor.
    """
    sizes = dict.fromkeys(COLLECTIVES, 0.0)
    for tensor in tensors:
        for collective, size in tensor.traffic(gap, passes).items():
            sizes[collective] += size
    return {name: size for name, size in sizes.items() if size}


def ring(size: float, processes: int, collective: str) -> float:
    """Bytes that a process sends (and receives as many) when ``size`` bytes go round a ring of ``processes``."""
    rounds = 2 if collective.startswith("all-reduce") else 1
    return rounds * size * (processes - 1) / processes
