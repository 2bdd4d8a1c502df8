"""What the processes of a job send each other in a step: counted from the trained tensors, as the memory plan is."""

from collections.abc import Iterable

from .lowrank.tensors.projected import LowRankSlot, Slot
from .lowrank.tensors.whole import RuleSlot


def payload(slots: Iterable[Slot], gap: int, micro_batches: int = 1) -> dict[str, float]:
    """Bytes of the tensors that an ordinary step reduces or broadcasts, by collective; and of layers whose rows are
    shared, what is gathered, forward and backward, and scattered for each of a process's ``micro_batches``.

    A layer's full gradient and fp32 basis travel once in ``gap`` steps, at most: a lazy schedule stretches its gap. The
    first step sends no full gradients. Of a mixture all experts count, as if each had tokens in every step. Meetings
    (24 bytes a process, some ten in a step; two for each tensor of an expert in a fused one) are left out.
    """
    sizes = dict.fromkeys(("all-reduce Δ gradients", "all-reduce dense gradients"), 0.0)
    sizes |= dict.fromkeys(("gather weights", "reduce-scatter Δ gradients"), 0.0)
    refresh = dict.fromkeys(("all-reduce full gradients of refreshes", "broadcast bases"), 0.0)
    for slot in slots:
        if not isinstance(slot, LowRankSlot):
            sizes["all-reduce dense gradients"] += slot.parameter.nbytes
            continue
        module = slot.module
        whole = module.probe.numel() * module.probe.dtype.itemsize
        if slot.shared:
            stored = [module.weight, *([] if module.weight_scale is None else [module.weight_scale])]
            sizes["gather weights"] += 2 * micro_batches * sum(tensor.nbytes for tensor in stored)
        if isinstance(slot, RuleSlot):
            sizes["all-reduce Δ gradients"] += whole  # the rule works on full ones
        else:
            often, collective = (micro_batches, "reduce-scatter") if slot.shared else (1, "all-reduce")
            sizes[f"{collective} Δ gradients"] += often * module.delta.numel() * module.delta.dtype.itemsize
            refresh["all-reduce full gradients of refreshes"] += whole / gap if slot.projected else 0.0
        sides = [side for side in (module.left, module.right) if side is not None and slot.projected]
        refresh["broadcast bases"] += sum(4.0 * side.dim * side.rank for side in sides) / gap
    return {name: size for name, size in (sizes | refresh).items() if size}


def ring(size: float, processes: int, collective: str) -> float:
    """Bytes that a process sends (and receives as many) when ``size`` bytes go round a ring of ``processes``."""
    rounds = 2 if collective.startswith("all-reduce") else 1
    return rounds * size * (processes - 1) / processes
