"""``qgalore plan``: what a run will need in memory, before anything is loaded."""

import argparse

from . import arguments as kinds
from . import door

EXAMPLES = """
  %(prog)s --config llama7b_16gb.yaml
  %(prog)s --config llama7b_16gb.yaml --world-size 4 train.grad_accumulation=4
"""


def add_configuration(parser: argparse.ArgumentParser) -> None:
    """The arguments that name a configuration: a file, and keys to change in it."""
    packaged = "a YAML file, here or one that comes with qgalore"
    parser.add_argument("--config", required=True, metavar="NAME|PATH", help=packaged)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.lr=0.001 run.name=second")


def add_world_size(parser: argparse.ArgumentParser) -> None:
    processes = kinds.whole(1, 2**16)
    parser.add_argument("--world-size", type=processes, default=1, metavar="N", help="processes to plan for (1)")


def parse(arguments: list[str], program: str) -> argparse.Namespace:
    parser = kinds.parser(program, "Print what a run will need in memory. Nothing is loaded or trained.", EXAMPLES)
    add_configuration(parser)
    add_world_size(parser)
    return parser.parse_intermixed_args(arguments)


def run(options: argparse.Namespace) -> None:
    from .. import config
    from ..training import assemble

    assemble.plan(config.load(options.config, options.overrides), options.world_size)


def main(arguments: list[str], program: str = "qgalore plan") -> int:
    options = parse(arguments, program)
    return door.leave(lambda: run(options))
