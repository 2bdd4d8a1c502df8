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
from pathlib import Path

import torch
from bench_steps import in_pairs, ratio_line, run_in

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from qgalore import config
from qgalore.cli import arguments as kinds
from qgalore.cli import door
from qgalore.data.mixing import Samples
from qgalore.data.sources import documents
from qgalore.errors import ConfigError
from qgalore.models import attention

WAYS = ("sdpa", "auto")


def documents_in_a_row(rows: Samples) -> float:
    """The mean over the training data."""
    found = [len(row) for n in range(len(rows)) for row in rows.batch([n])["documents"].lengths]
    return statistics.mean(found)


def cut(settings: config.Config, characters: int, path: Path) -> None:
    """Write the run's text as documents of so many characters."""
    pieces = (
        text[start : start + characters]
        for source in settings.data.sources.values()
        for text in documents(source.path, text_key=source.text_key)
        for start in range(0, len(text), characters)
    )
    path.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces), encoding="utf-8")


def measure(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "pieces.jsonl"
        cut(config.load(options.config, options.overrides), options.characters, text)
        common = [*options.overrides, f"data.train={text}", f"data.valid={text}", "data.text_key=text"]
        masked, separate = (
            run_in(folder, way, options.config, [*common, f"model.attention={way}"], options.pairs) for way in WAYS
        )
        if attention.implementation(separate.model) != attention.BY_DOCUMENT:
            raise ConfigError("this model does not attend document by document; a line above says why")
        fast, slow, _ = in_pairs(separate, masked, options.pairs)
        held = documents_in_a_row(separate.data.train)
    print(f"{held:.1f} documents in a row; {torch.get_num_threads()} thread(s), torch {torch.__version__}")
    print(f"with a mask {statistics.median(slow):.3f} s a step, "
          f"a call for each document {statistics.median(fast):.3f} s")  # fmt: skip
    print(ratio_line(fast, slow))


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
