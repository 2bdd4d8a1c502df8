"""The tables of docs/scaling.md: what each card of a cluster keeps and sends, and the tokens that hide what it sends.

    python tools/cluster_tables.py [--shapes 7B 32B 70B 405B] [--cards 8 64 256 1024] [--card H100] [key=value …]

Nothing is loaded: the trainer's own tensors are made without values and counted, and rates come from a table. So none
of it is measured. Shapes are Llama's, and Qwen3's at 32B. Ranks are a quarter of the width, and machines have 8 cards.
"""

import argparse
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from qgalore.cli import arguments as kinds
from qgalore.cli import door

PER_MACHINE = 8
BASE = "llama7b_16gb.yaml"
COMMON = ("memory.budget=null", "train.grad_accumulation=65536", "train.activation_checkpointing=true")


@dataclass(frozen=True)
class Shape:
    """A preset with changes of its sizes, and its vocabulary."""

    preset: str
    rank: int
    vocabulary: int
    changes: str = ""

    def overrides(self) -> list[str]:
        sizes = f"model.overrides={{vocab_size: {self.vocabulary}{self.changes}}}"
        return [f"model.config={self.preset}", sizes, f"lowrank.rank={self.rank}"]


SHAPES = {
    "7B": Shape("llama_7b", 1024, 32000),
    "32B": Shape("qwen3_32b", 1280, 151936),
    "70B": Shape("llama2_70b", 2048, 32000),
    "405B": Shape(
        "llama2_70b",
        4096,
        128256,
        ", hidden_size: 16384, intermediate_size: 53248, num_hidden_layers: 126, num_attention_heads: 128",
    ),
}


def figures(name: str, options: argparse.Namespace) -> dict[str, dict[int, Any]]:
    """The figures of a shape by what splits it and by the number of cards: all cards, or those of each machine."""
    from qgalore import config
    from qgalore.training import cluster
    from qgalore.training.model import Vocabulary
    from qgalore.training.roofline import seconds_of_a_token

    shape, machines = SHAPES[name], cluster.Machines(PER_MACHINE, options.card)
    vocabulary, token = Vocabulary(shape.vocabulary, None, None), None
    found: dict[str, dict[int, Any]] = {"all": {}, "machine": {}}
    for split, count in product(found, options.cards):
        sizes = f"{{replicate: {count // PER_MACHINE}, shard: {PER_MACHINE}}}"
        parallel = "shard" if split == "all" else sizes
        overrides = [*COMMON, *shape.overrides(), f"parallel={parallel}", *options.overrides]
        resolved = config.resolve(config.load(BASE, overrides), "cuda", True, count)
        if token is None:
            token = seconds_of_a_token(resolved, vocabulary, machines.linked_card())
        found[split][count] = cluster.figures(resolved, vocabulary, count, machines, token)
    return found


def gib(size: float) -> str:
    return f"{size / 2**30:,.1f}"


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def tables(names: list[str], options: argparse.Namespace) -> str:
    """Two tables in Markdown: what a card keeps, and what it sends."""
    cards = [f"{count:,}" for count in options.cards]
    kept = [
        row("", "split over", *cards, "blocks at work", "gradients", "first step"),
        row(*["---"] * (len(cards) + 5)),
    ]
    sent = [row("", "split over", *cards), row(*["---"] * (len(cards) + 2))]
    for name in names:
        for split, by_count in figures(name, options).items():
            found, over = list(by_count.values()), "all" if split == "all" else f"{PER_MACHINE}"
            one = found[-1].share
            work = map(gib, (one.gathered, one.gradients, one.first))
            kept.append(row(name, over, *(gib(each.share.kept) for each in found), *work))
            sizes = ((each.wire.inside, each.wire.between, each.tokens) for each in found)
            sent.append(row(name, over, *(f"{gib(a)} + {gib(b)}, {tokens:,.0f}" for a, b, tokens in sizes)))
    titles = (
        "GiB that the fullest card keeps between two steps, and what it needs beside at work:",
        "GiB that the mean card sends in a step, inside its machine + to others, and the tokens that hide it:",
    )
    return "\n".join((titles[0], "", *kept, "", titles[1], "", *sent))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    count = kinds.whole(PER_MACHINE, 2**16)
    parser.add_argument("--cards", nargs="+", type=count, default=[8, 64, 256, 1024], help="multiples of 8")
    parser.add_argument("--card", default="H100", help="whose rate and links are assumed")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the configuration")
    options = parser.parse_intermixed_args(arguments)
    return door.leave(lambda: print(tables(options.shapes, options)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
