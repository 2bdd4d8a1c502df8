"""Compare a causal call for each document with a mask: the time of whole training steps, in pairs.

    python tools/bench_attention.py [--config quickstart.yaml] [--pairs 5] [--characters 1000] [key=value …]

The documents are pieces of ``--characters`` of ``data.train``. Two runs of ``--config`` differ in ``model.attention``
alone, ``sdpa`` in one and ``auto`` in the other. Each takes a first step, which is not counted. Then they take turns,
and which of them begins changes from pair to pair. Printed are the documents in a row, each run's median seconds of a
step, and the median of the pairs' ratios with its range.
"""

import argparse
import json
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
from qgalore.data.packing import PackedSequences
from qgalore.data.sources import documents
from qgalore.errors import ConfigError
from qgalore.models import attention
from qgalore.training import assemble
from qgalore.training.loop import Loop

WAYS = ("sdpa", "auto")


def step_seconds(loop: Loop) -> float:
    started = time.perf_counter()
    loop._step()
    if loop.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def documents_in_a_row(rows: PackedSequences) -> float:
    """The mean over the training data."""
    found = [len(row) for n in range(len(rows)) for row in rows.batch([n])["documents"].lengths]
    return statistics.mean(found)


def cut(settings: config.Config, characters: int, path: Path) -> None:
    """Write the run's text as documents of so many characters."""
    pieces = (
        text[start : start + characters]
        for text in documents(settings.data.train, text_key=settings.data.text_key)
        for start in range(0, len(text), characters)
    )
    path.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces), encoding="utf-8")


def measure(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "pieces.jsonl"
        cut(config.load(options.config, options.overrides), options.characters, text)
        common = [f"run.dir={folder}", f"data.cache_dir={folder}/cache", f"train.max_steps={options.pairs + 1}"]
        common += [*options.overrides, f"data.train={text}", f"data.valid={text}", "data.text_key=text"]
        loops: dict[str, Loop] = {}
        for way in WAYS:
            overrides = [*common, f"run.name={way}", f"model.attention={way}"]
            loops[way] = assemble.build(config.load(options.config, overrides), None).loop
        if attention.implementation(loops["auto"].model) != attention.BY_DOCUMENT:
            raise ConfigError("this model does not attend document by document; a line above says why")
        for loop in loops.values():
            loop.model.train()
            step_seconds(loop)
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for pair in range(options.pairs):
            for way in WAYS if pair % 2 else reversed(WAYS):
                seconds[way].append(step_seconds(loops[way]))
        held = documents_in_a_row(loops["auto"].data.train)
    ratios = sorted(masked / separate for masked, separate in zip(*seconds.values(), strict=True))
    print(f"{held:.1f} documents in a row; {torch.get_num_threads()} thread(s), torch {torch.__version__}")
    print(f"with a mask {statistics.median(seconds['sdpa']):.3f} s a step, "
          f"a call for each document {statistics.median(seconds['auto']):.3f} s")  # fmt: skip
    print(f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f} in {len(ratios)} pairs)")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="quickstart.yaml")
    parser.add_argument("--pairs", type=kinds.whole(1), default=5)
    parser.add_argument("--characters", type=kinds.whole(1), default=1000)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args(arguments)
    return door.leave(lambda: measure(options))


if __name__ == "__main__":
    sys.exit(main())
