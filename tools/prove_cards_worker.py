"""One process of a run that ``prove_cards.py`` looks at: train.py, with one step's collectives counted.

    torchrun … prove_cards_worker.py FOLDER STEP --config NAME key=value …

FOLDER/rank-N.json then holds what process N handed to collectives in step STEP, by kind, as bytes that it sends, and
the most memory that it took. Round a ring of n processes a sum sends each byte 2 (n − 1) / n times. Gathering sends a
process's own bytes n − 1 times, and all else sends each byte (n − 1) / n times.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from torch import Tensor, distributed
from torch.distributed import distributed_c10d
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qgalore.cli.train import main
from qgalore.training.loop import Loop
from qgalore.training.records import memory_row

# By a part of its name without underscores: where a collective of c10d keeps what the process brings, and how often
# each byte of that is sent. Functional collectives, which DTensor uses, have it in the first place.
KINDS = {
    "allreduce": (0, lambda n: 2 * (n - 1) / n),
    "allgather": (1, lambda n: n - 1),
    "reducescatter": (1, lambda n: (n - 1) / n),
    "alltoall": (1, lambda n: (n - 1) / n),
    "broadcast": (0, lambda n: (n - 1) / n),
    "reduce": (0, lambda n: (n - 1) / n),
}


class Wire(TorchDispatchMode):
    """Counts the bytes that this process sends in collectives, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        functional = func.namespace == "_c10d_functional"
        sends = not functional or not func.__name__.startswith(("wait", "_wrap"))
        if func.namespace in ("c10d", "_c10d_functional") and sends:
            self._count(func.__name__.partition(".")[0].replace("_", ""), args, functional)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple[Any, ...], functional: bool) -> None:
        kind = next((kind for kind in KINDS if kind in name), None)
        if kind is None:
            self.sent[f"not counted: {name}"] += 1
            return
        place, times = KINDS[kind]
        if functional:
            group = distributed_c10d._resolve_process_group([one for one in args if isinstance(one, str)][-1])
        else:
            group = next(distributed.ProcessGroup.unbox(one) for one in args if isinstance(one, torch.ScriptObject))
        size, given = group.size(), args[0 if functional else place]
        brought = sum(leaf.nbytes for leaf in tree_leaves(given) if isinstance(leaf, Tensor))
        self.sent[kind] += round(brought * times(size))


def counted(step: int, wire: Wire) -> None:
    """Let the loop take the step number ``step``, from 1 on, under ``wire``."""
    take = Loop._step

    def watched(loop: Loop) -> dict[str, Any]:
        if loop.position.step + 1 != step:
            return take(loop)
        with wire:
            return take(loop)

    Loop._step = watched


def run(folder: Path, step: int, arguments: list[str]) -> int:
    wire = Wire()
    counted(step, wire)
    code = main(arguments, "python train.py")
    cuda = torch.cuda.is_available() and "device=cpu" not in arguments
    memory = memory_row(torch.device("cuda" if cuda else "cpu"))
    folder.mkdir(parents=True, exist_ok=True)
    found = {"sent": dict(wire.sent), **memory}
    (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(found), encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
