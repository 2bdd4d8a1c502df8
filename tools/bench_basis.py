"""Compare the randomized basis with the exact one on gradients of a run: energy captured, and time.

    python tools/bench_basis.py [--config quickstart.yaml] [--rank 128] [--steps 8] [--ago 4] [--layer mlp.up_proj]
                                [--depths first middle last] [--power-iterations 2] [--clock wall] [key=value …]

A run of ``--config`` with the ``key=value`` of train.py takes ``--steps`` steps. The full gradients of the named layer
in its first, middle and last block are then found on the next batch, and ``--ago`` steps earlier, which gives the basis
that a warm start begins from. Printed for each block: seconds of the exact decomposition; of the randomized one, cold
and warm, with its ratio to exact; and how much of the exact basis's captured energy ‖G P‖² the randomized one captures.
Where one iteration is enough (``search.GAIN``) cold and warm find the same basis.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from qgalore import config
from qgalore.cli import arguments as kinds
from qgalore.cli import door
from qgalore.errors import ConfigError
from qgalore.lowrank.layers.linear import LowRankLinear
from qgalore.lowrank.subspace import search
from qgalore.training import assemble
from qgalore.training.loop import Loop

DEPTHS = ("first", "middle", "last")


def chosen_layers(model: torch.nn.Module, layer: str, depths: list[str]) -> dict[str, LowRankLinear]:
    """The layers whose names end with ``layer``, at these depths. Raises :class:`ConfigError` if there is none."""
    found = [m for n, m in model.named_modules() if n.endswith(layer) and isinstance(m, LowRankLinear)]
    if not found:
        raise ConfigError(f"--layer {layer!r} ends no low-rank layer's name; mlp.up_proj, for example, does in a Llama")
    at = {"first": 0, "middle": len(found) // 2, "last": -1}
    return {depth: found[at[depth]] for depth in depths}


def gradients(loop: Loop, batch: dict[str, Tensor], layers: list[LowRankLinear]) -> list[Tensor]:
    """Full gradients (out, in) on ``batch``, through the probes; no hook runs and nothing is stepped."""
    probes = [layer.probe for layer in layers]
    armed = [probe.requires_grad for probe in probes]
    for probe in probes:
        probe.requires_grad_(True)
    found = torch.autograd.grad(loop.loss(loop.model, batch) / batch["labels"].numel(), probes)
    for probe, before in zip(probes, armed, strict=True):
        probe.requires_grad_(before)
    return list(found)


def captured(settings: config.Config, layer: str, depths: list[str], steps: int, ago: int) -> dict[str, list[Tensor]]:
    """Gradients by depth, ``ago`` steps before the end of the run and at its end, oriented so that the basis is on the
    right and has the shorter dimension."""
    loop = assemble.build(settings, None).loop
    layers = chosen_layers(loop.model, layer, depths)
    size, found = settings.train.micro_batch_size, {depth: [] for depth in depths}
    for number in range(steps + 1):
        batch = loop.data.train.batch(range(number * size, (number + 1) * size))
        if number in (steps - ago, steps):
            for depth, gradient in zip(depths, gradients(loop, batch, list(layers.values())), strict=True):
                tall = gradient.shape[0] >= gradient.shape[1]
                found[depth].append((gradient if tall else gradient.T).contiguous())
        if number < steps:
            (loop.loss(loop.model, batch) / batch["labels"].numel()).backward()
            loop.optimizer.step()
    return found


def timed(clock: Callable[[], float], find: Callable[[], Tensor]) -> tuple[float, Tensor]:
    started = clock()
    basis = find()
    return clock() - started, basis


def compare(
    before: Tensor, gradient: Tensor, rank: int, power_iterations: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Seconds and shares of the exact basis's energy, for one gradient (out, in)."""
    generator = torch.Generator().manual_seed(0)
    warm = search.randomized_basis(before, rank, generator)
    seconds, exact = timed(clock, lambda: search.exact_basis(gradient, rank))
    row = {"energy": search.captured_energy(gradient, exact), "exact": seconds}
    for name, start in (("cold", None), ("warm", warm)):
        find = partial(search.randomized_basis, gradient, rank, generator, start, power_iterations)
        row[name], basis = timed(clock, find)
        row[f"{name}_share"] = search.captured_energy(gradient, basis) / row["energy"]
    return row


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="quickstart.yaml")
    parser.add_argument("--rank", type=kinds.whole(1), default=128)
    parser.add_argument("--steps", type=kinds.whole(1), default=8)
    parser.add_argument("--ago", type=kinds.whole(1), default=4)
    parser.add_argument("--layer", default="mlp.up_proj")
    parser.add_argument("--depths", nargs="+", choices=DEPTHS, default=list(DEPTHS))
    parser.add_argument("--power-iterations", type=kinds.whole(0), default=2)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args(arguments)
    if not 0 < options.ago <= options.steps:
        parser.error(f"--ago {options.ago} must be between 1 and --steps {options.steps}")
    return door.leave(lambda: measure(options))


def measure(options: argparse.Namespace) -> None:
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    with tempfile.TemporaryDirectory() as folder:
        settings = config.load(options.config, [f"run.dir={folder}", *options.overrides])
        found = captured(settings, options.layer, options.depths, options.steps, options.ago)
    print(f"{options.layer}, rank {options.rank}, after {options.steps} steps; {options.clock} seconds, "
          f"{torch.get_num_threads()} thread(s), torch {torch.__version__}")  # fmt: skip
    print("depth   shape         energy  exact s   cold s  ratio  of exact's energy   warm s  ratio  of exact's energy")
    for depth, pair in found.items():
        row = compare(*pair, options.rank, options.power_iterations, clock)
        cells = [f"{depth:7} {'×'.join(map(str, pair[1].shape)):12} {row['energy']:7.4f} {row['exact']:8.3f}"]
        for name in ("cold", "warm"):
            cells.append(f"{row[name]:8.3f} {row['exact'] / row[name]:6.1f} {row[f'{name}_share']:18.5f}")
        print(" ".join(cells), flush=True)


if __name__ == "__main__":
    sys.exit(main())
