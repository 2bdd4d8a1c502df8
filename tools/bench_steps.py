"""Compare two runs of one configuration by the time of their training steps, in pairs.

    python tools/bench_steps.py [--config quickstart.yaml] --one "train.order=batch_major" --other "" [--pairs 7]
                                [key=value …]

The runs differ in what ``--one`` and ``--other`` say, and share the other overrides. Each takes a first step, which is
not counted. Then they take turns, and which of them begins changes from pair to pair. Printed are each run's median
seconds of a step, whether the two saw the same losses, and the median of the pairs' ratios with its range.

docs/results.md compares the orders of a step with (for one micro-batch: 9 pairs of train.micro_batch_size=4
train.grad_accumulation=1)

    T=configs/quickstart_data
    OMP_NUM_THREADS=1 python tools/bench_steps.py --config llama60m.yaml --one train.order=batch_major
        --other train.order=layer_major device=cpu data.train=$T/train.jsonl.gz data.valid=$T/valid.jsonl.gz
        data.tokenizer=null data.vocab_size=4096 data.sequence_length=256 train.activation_checkpointing=true
        train.micro_batch_size=2 train.grad_accumulation=8
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from qgalore import config
from qgalore.cli import arguments as kinds
from qgalore.cli import door
from qgalore.training import assemble
from qgalore.training.loop import Loop


def run_in(folder: str, name: str, configuration: str, overrides: list[str], pairs: int) -> Loop:
    """A run that is ready for its first step."""
    places = [f"run.dir={folder}", f"data.cache_dir={folder}/cache", f"run.name={name}"]
    settings = config.load(configuration, [*places, f"train.max_steps={pairs + 1}", "train.epochs=null", *overrides])
    loop = assemble.build(settings, None).loop
    loop.model.train()
    return loop


def step_seconds(loop: Loop) -> tuple[float, float]:
    """The seconds that a step takes, and its loss."""
    started = time.perf_counter()
    loss = loop._step()["loss"]
    if loop.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, loss


def in_pairs(one: Loop, other: Loop, pairs: int) -> tuple[list[float], list[float], bool]:
    """The seconds of so many steps of each, and whether the losses were the same in every bit."""
    same = step_seconds(one)[1] == step_seconds(other)[1]
    seconds: tuple[list[float], list[float]] = ([], [])
    for pair in range(pairs):
        turns = [(one, seconds[0]), (other, seconds[1])]
        losses = []
        for loop, taken in turns if pair % 2 else reversed(turns):
            duration, loss = step_seconds(loop)
            taken.append(duration)
            losses.append(loss)
        same = same and losses[0] == losses[1]
    return *seconds, same


def ratio_line(one: list[float], other: list[float]) -> str:
    """The median of the pairs' ratios, other to one, with its range."""
    ratios = sorted(second / first for first, second in zip(one, other, strict=True))
    return f"ratio {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f} in {len(ratios)} pairs)"


def measure(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ways = {"one": options.one.split(), "other": options.other.split()}
        loops = [
            run_in(folder, name, options.config, [*options.overrides, *way], options.pairs)
            for name, way in ways.items()
        ]
        one, other, same = in_pairs(*loops, options.pairs)
    print(f"{torch.get_num_threads()} thread(s), torch {torch.__version__}; "
          f"losses {'the same in every bit' if same else 'not the same'}")  # fmt: skip
    for way, seconds in zip(ways.values(), (one, other), strict=True):
        print(f"{statistics.median(seconds):.3f} s a step with {' '.join(way) or 'no change'}")
    print(ratio_line(one, other))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="quickstart.yaml")
    parser.add_argument("--pairs", type=kinds.whole(1), default=7)
    parser.add_argument("--one", default="", metavar="'key=value …'")
    parser.add_argument("--other", default="", metavar="'key=value …'")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args(arguments)
    return door.leave(lambda: measure(options))


if __name__ == "__main__":
    sys.exit(main())
