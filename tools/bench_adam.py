"""Time one optimizer step of AdamW in its 8-bit and fp32 forms on this machine's CPU, paired.

    python tools/bench_adam.py [--shape 4096 128] [--repeats 9]

Prints the median of nanoseconds for each element and its ratio to torch's AdamW. Set OMP_NUM_THREADS to choose threads.
"""

import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from qgalore.lowrank.inner.checked import optimizer_class

CLASSES = {
    "torch": torch.optim.AdamW,
    "torch, fused": partial(torch.optim.AdamW, fused=True),
    "bitsandbytes 8-bit": optimizer_class("bitsandbytes.optim.AdamW8bit"),
    "qgalore 8-bit": optimizer_class("adamw8bit"),
}


def measure(shape: list[int], repeats: int) -> dict[str, float]:
    """Median seconds of a step for each class; the classes take turns, so that a busy machine slows all alike."""
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    optimizers = {}
    for name, make in CLASSES.items():
        leaf = torch.nn.Parameter(torch.zeros(shape))
        leaf.grad = gradient.clone()
        optimizers[name] = make([leaf], lr=1e-3, weight_decay=0.0)
        optimizers[name].step()  # makes the state
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(repeats):
        for name, optimizer in optimizers.items():
            started = time.perf_counter()
            optimizer.step()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs="+", default=[4096, 128])
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    medians = measure(arguments.shape, arguments.repeats)
    count = torch.Size(arguments.shape).numel()
    print(f"shape {arguments.shape}, {torch.get_num_threads()} thread(s), median of {arguments.repeats} steps")
    for name, seconds in medians.items():
        print(f"{name:20s} {seconds / count * 1e9:7.2f} ns/element  {seconds / medians['torch']:6.2f} x torch")


if __name__ == "__main__":
    main()
