"""How a training step's cost grows with width, depth, rank and sequence length: exponents, and a plot.

    python tools/bench_scaling.py [--methods adamw qgalore] [--html scaling.html] [--tokens 2048] [--vocabulary 1024]
                                  [--width 256] [--depth 4] [--rank 64] [--sequence 128] [--doublings 3] [--rounds 3]
                                  [--clock wall]

Each quantity is doubled ``--doublings`` times while the others stay; the number of tokens in a step always does. A line
of least squares through (log quantity, log seconds) gives the exponent: 1 is linear, 2 quadratic. ± is its standard
error; few points on a busy machine say little. Between 0 and 1 a part of the step does not depend on the quantity.
"""

import argparse
import math
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import bench

from qgalore.cli import arguments as kinds
from qgalore.cli import door
from qgalore.convergence import plot, report
from qgalore.files.atomic import write_report
from qgalore.models import loading

QUANTITIES = ("width", "depth", "rank", "sequence")


def fit(points: list[tuple[float, float]]) -> tuple[float, float]:
    """(exponent, its standard error) of seconds = c · quantity^exponent, by least squares of the logarithms; the error
    is infinite for two points."""
    xs, ys = zip(*[(math.log(a), math.log(b)) for a, b in points], strict=True)
    slope, offset = statistics.linear_regression(xs, ys)
    residue = sum((y - offset - slope * x) ** 2 for x, y in zip(xs, ys, strict=True))
    spread = sum((x - statistics.fmean(xs)) ** 2 for x in xs)
    return slope, math.sqrt(residue / (len(xs) - 2) / spread) if len(xs) > 2 else math.inf


def seconds(name: str, shape: dict[str, int], tokens: int, vocabulary: int, rounds: int) -> float:
    """Median seconds of an ordinary step, after two that make bases and moments."""
    width = shape["width"]
    changes = {"hidden_size": width, "intermediate_size": max(1, width // 12) * 32, "num_hidden_layers": shape["depth"]}
    heads = max(1, width // 64)
    changes |= {"num_attention_heads": heads, "num_key_value_heads": heads, "max_position_embeddings": 1 << 16}
    config = loading.model_config("llama_60m", tokenizer_size=vocabulary, overrides=changes, report=lambda text: None)
    method = bench.make(name, config, shape["rank"], torch.float32, torch.device("cpu"))
    rows = (tokens // shape["sequence"], shape["sequence"])
    ids = torch.randint(vocabulary, rows, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(shape["sequence"]).expand(rows)
    batch = {"input_ids": ids, "labels": ids.roll(-1, 1), "position_ids": positions}
    return statistics.median([bench.take(method, batch)["step"] for _ in range(rounds + 2)][2:])


def page(found: dict[str, dict[str, list[tuple[float, float]]]], note: str) -> str:
    """The plots as a page of its own: a figure for each method, seconds against doublings of each quantity."""
    parts = [f"<p>{note}</p>"]
    for name, sweeps in found.items():
        series = []
        for colour, (quantity, points) in enumerate(sweeps.items()):
            exponent, error = fit(points)
            label = f"{quantity} from {points[0][0]}: exponent {exponent:.2f} ±{error:.2f}"
            series.append(plot.Series(label, [(math.log2(a / points[0][0]), b) for a, b in points], colour))
        every = [b for points in sweeps.values() for _, b in points]
        limits = (min(every) / 1.1, max(every) * 1.1)
        title = f"{name}: seconds of a step (logarithmic)"
        parts.append(plot.lines(title, series, "doublings of the quantity", "seconds", y_limits=limits, base=2))
    return report.document("Cost of a training step", "".join(parts))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=tuple(bench.MAKERS), default=["adamw", "qgalore"])
    parser.add_argument("--html", type=Path)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    defaults = {"tokens": 2048, "vocabulary": 1024, "doublings": 3, "rounds": 3}
    start = {"width": 256, "depth": 4, "rank": 64, "sequence": 128}
    for name, value in (start | defaults).items():
        parser.add_argument(f"--{name}", type=kinds.whole(1), default=value)
    options = parser.parse_args(arguments)
    start = {name: getattr(options, name) for name in QUANTITIES}
    if options.tokens % (start["sequence"] << options.doublings):
        parser.error(f"--tokens {options.tokens} is not a multiple of the longest sequence")
    bench.Clock.read_cpu = staticmethod(time.process_time if options.clock == "cpu" else time.perf_counter)
    found: dict[str, dict[str, list[tuple[float, float]]]] = {name: {} for name in options.methods}
    for quantity in QUANTITIES:
        for doubling in range(options.doublings + 1):
            shape = {**start, quantity: start[quantity] << doubling}
            for name in options.methods:
                cost = seconds(name, shape, options.tokens, options.vocabulary, options.rounds)
                found[name].setdefault(quantity, []).append((shape[quantity], cost))
    note = f"{options.tokens} tokens a step, vocabulary {options.vocabulary}, {options.clock} time, " + ", ".join(
        f"{quantity} {value}" for quantity, value in start.items()
    )
    print(f"{note}, {torch.get_num_threads()} thread(s), torch {torch.__version__}; seconds")
    for name, sweeps in found.items():
        for quantity, points in sweeps.items():
            exponent, error = fit(points)
            values = "  ".join(f"{a}: {b:.3f}" for a, b in points)
            print(f"{name:12} {quantity:9} exponent {exponent:5.2f} ±{error:.2f}   {values}")
    if options.html:
        write_report(options.html, page(found, note))
    return 0


if __name__ == "__main__":
    sys.exit(door.leave(lambda: main()))
