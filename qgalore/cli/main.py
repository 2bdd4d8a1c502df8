"""The program ``qgalore``: its first argument names a command, and only that command's module is imported."""

import argparse
import sys
from importlib import import_module

import qgalore

from . import arguments as kinds
from . import door

COMMANDS = {
    "train": "train a language model, from scratch or from pretrained weights",
    "plan": "print what a run will need in memory",
    "evaluate": "score a model on questions and on held-out text",
    "generate": "continue a prompt with an exported model",
    "chat": "talk with an exported model",
    "export": "write a checkpoint's model for transformers, vLLM or llama.cpp",
    "convergence": "show how training and its subspaces converge",
    "doctor": "check this machine: versions, kernels, speed, and what fits",
    "compare": "train variants of a configuration and compare them",
}
EXAMPLES = """
  %(prog)s train --config quickstart.yaml
  %(prog)s plan --config llama7b_16gb.yaml
"""


def parser() -> argparse.ArgumentParser:
    made = kinds.parser("qgalore", "Train all the weights of a language model in little memory.", EXAMPLES)
    made.add_argument("--version", action="version", version=f"qgalore {qgalore.__version__}")
    lines = "\n".join(f"  {name:<12} {does}" for name, does in COMMANDS.items())
    made.description += f"\n\ncommands:\n{lines}\n\nqgalore COMMAND --help says more of each."
    made.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the commands above")
    made.add_argument("arguments", nargs=argparse.REMAINDER, help="those of the command")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Run the command that ``arguments`` (None: those of the process) name. Returns its exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    if given and given[0] in COMMANDS:  # what follows is the command's own, --help and --version included
        return import_module(f".{given[0]}", __package__).main(given[1:])
    if not given:
        return door.leave(parser().print_help)
    parser().parse_args(given)  # prints help or the version, or names what is wrong, and leaves
    return 0
