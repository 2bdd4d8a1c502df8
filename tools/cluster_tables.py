"""The tables of docs/scaling.md: what each card of a cluster keeps and sends, and the tokens that hide what it sends.

    python tools/cluster_tables.py [key=value …] [--shapes 7B 32B 70B 405B] [--cards 8 64 256 1024] [--card H100]

Nothing is loaded: the trainer's own tensors are made without values and counted, and rates come from a table. So none
of it is measured. Shapes are Llama's, and Qwen3's at 32B. Ranks are a quarter of the width, and machines have 8 cards.
"""

import argparse
import sys
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from qgalore.cli import arguments as kinds
from qgalore.cli import door

PER_MACHINE = 8
ALL, MACHINE = "all", "a machine"  # what the blocks are split over
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


def resolved(shape: Shape, split: str, count: int, overrides: list[str]) -> Any:
    """The configuration of ``shape`` on so many cards: split over ``all``, or over those of each ``machine``."""
    from qgalore import config

    sizes = f"{{replicate: {count // PER_MACHINE}, shard: {PER_MACHINE}}}"
    parallel = f"parallel={'shard' if split == ALL else sizes}"
    return config.resolve(config.load(BASE, [*COMMON, *shape.overrides(), parallel, *overrides]), "cuda", True, count)


def rows(name: str, options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The rows of a shape in both tables."""
    from qgalore.training import cluster
    from qgalore.training.fit import changed
    from qgalore.training.model import Vocabulary
    from qgalore.training.paper import plan_for
    from qgalore.training.roofline import seconds_of_a_token

    shape, machines = SHAPES[name], cluster.Machines(PER_MACHINE, options.card)
    vocabulary, kept, sent = Vocabulary(shape.vocabulary, None, None), [], []
    config = resolved(shape, ALL, PER_MACHINE, options.overrides)
    token = seconds_of_a_token(config, vocabulary, machines.linked_card())
    # What a step needs beside what is kept does not depend on the number of cards.
    planned = plan_for(changed(config, {"train.grad_accumulation": 1}), vocabulary, "cuda", processes=PER_MACHINE)
    beside = planned.total - sum(planned.resident.values())
    for split in (ALL, MACHINE):
        many = [resolved(shape, split, count, options.overrides) for count in options.cards]
        found = [
            cluster.figures(config, vocabulary, count, machines, token)
            for config, count in zip(many, options.cards, strict=True)
        ]
        kept.append(row(name, split, *(f"{gib(one.kept)} → {gib(one.kept + beside)}" for one in found)))
        sizes = [f"{gib(one.wire.inside)} + {gib(one.wire.between)}" for one in found]
        sent.append(
            row(
                name,
                split,
                *(f"{size}; {one.tokens:,.0f}; {one.waited:.2f}" for size, one in zip(sizes, found, strict=True)),
            )
        )
    return kept, sent


def gib(size: float) -> str:
    return f"{size / 2**30:,.1f}"


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def tables(options: argparse.Namespace) -> str:
    """Two tables in Markdown: what a card keeps, and what it sends."""
    head = [
        row("", "split over", *(f"{count:,} cards" for count in options.cards)),
        "|---" * (len(options.cards) + 2) + "|",
    ]
    kept, sent = zip(*(rows(name, options) for name in options.shapes), strict=True)
    titles = (
        "GiB that the fullest card keeps between two steps → its planned peak with one sequence of 2,048 tokens:",
        "GiB that the mean card sends in a step, inside its machine + to others; the tokens of a card that hide what "
        "travels beside work; the seconds that a step waits for what owners hand out and for embeddings and head:",
    )
    return "\n".join((titles[0], "", *head, *chain(*kept), "", titles[1], "", *head, *chain(*sent)))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    count = kinds.whole(PER_MACHINE, 2**16)
    parser.add_argument("--cards", nargs="+", type=count, default=[8, 64, 256, 1024], help="multiples of 8")
    parser.add_argument("--card", default="H100", help="whose rate and links are assumed")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the configuration")
    options = parser.parse_intermixed_args(arguments)
    return door.leave(lambda: print(tables(options)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
