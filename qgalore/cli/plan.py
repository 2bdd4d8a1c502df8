"""``qgalore plan``: what a run will need in memory, before anything is loaded."""

import argparse

from . import arguments as kinds
from . import door

EXAMPLES = """
  %(prog)s --config llama7b_16gb.yaml
  %(prog)s --config llama7b_16gb.yaml --world-size 16 --card A100 --link-between 12.5 train.grad_accumulation=16
"""


def add_configuration(parser: argparse.ArgumentParser) -> None:
    """The arguments that name a configuration: a file, and keys to change in it."""
    packaged = "a YAML file, here or one that comes with qgalore"
    parser.add_argument("--config", required=True, metavar="NAME|PATH", help=packaged)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.lr=0.001 run.name=second")


def add_world_size(parser: argparse.ArgumentParser) -> None:
    """The arguments that describe a job of several processes, one on each card."""
    processes, rate = kinds.whole(1, 2**16), kinds.real(1e-3, 1e6)
    parser.add_argument("--world-size", type=processes, default=1, metavar="N", help="processes to plan for (1)")
    parser.add_argument("--per-machine", type=processes, metavar="N", help="cards in a machine (8, or all if fewer)")
    parser.add_argument("--card", metavar="NAME", help="the card whose work and links are assumed (H100)")
    for place, what in (("inside", "to others in its machine"), ("between", "to other machines")):
        text = f"what a card can send {what}, assumed (what such cards have)"
        parser.add_argument(f"--link-{place}", type=rate, metavar="GB/s", help=text)


def check_world_size(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with a message if ``options`` describe the machines of a job that is not planned."""
    of_machines = ("per_machine", "card", "link_inside", "link_between")
    given = [f"--{name.replace('_', '-')}" for name in of_machines if getattr(options, name) is not None]
    if given and options.world_size == 1:
        parser.error(f"{given[0]} tells of a job on several cards; add --world-size N, which is how many")


def parse(arguments: list[str], program: str) -> argparse.Namespace:
    parser = kinds.parser(program, "Print what a run will need in memory. Nothing is loaded or trained.", EXAMPLES)
    add_configuration(parser)
    add_world_size(parser)
    options = parser.parse_intermixed_args(arguments)
    check_world_size(parser, options)
    return options


def run(options: argparse.Namespace) -> None:
    from .. import config
    from ..training import assemble
    from ..training.cluster import Machines

    machines = Machines(options.per_machine, options.card, options.link_inside, options.link_between)
    assemble.plan(config.load(options.config, options.overrides), options.world_size, machines)


main = door.program("qgalore plan", parse, run)
