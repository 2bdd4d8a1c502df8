"""``qgalore doctor``: whether this machine is ready, and how fast it will be."""

import argparse

from . import arguments as kinds
from . import door

EXAMPLES = """
  %(prog)s
  %(prog)s --cpu
"""


def parse(arguments: list[str], program: str) -> argparse.Namespace:
    does = (
        "Check this machine: versions, every kernel against plain PyTorch, rates, the times of one layer, and which "
        "shipped configurations fit. Exit code 1 means that a kernel is wrong here."
    )
    parser = kinds.parser(program, does, EXAMPLES)
    parser.add_argument("--cpu", action="store_true", help="examine the CPU, with small sizes, even if there is a GPU")
    parser.add_argument("--configs", nargs="+", metavar="NAME", help="configurations to look at in place of the usual")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    import torch

    from .. import doctor

    device = torch.device("cuda" if torch.cuda.is_available() and not options.cpu else "cpu")
    names = None if options.configs is None else tuple(options.configs)
    return 0 if doctor.examine(device, names) else 1


main = door.program("qgalore doctor", parse, run)
