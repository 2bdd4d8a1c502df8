"""``qgalore export``: a checkpoint's model for other programs."""

import argparse
from pathlib import Path

from . import arguments as kinds
from . import door

EXAMPLES = """
  %(prog)s runs/quickstart --format gguf --out quickstart-gguf
  %(prog)s runs/quickstart/checkpoints/step-00000300 --format int8 --out q-int8 --push q-int8
"""


def parse(arguments: list[str], program: str) -> argparse.Namespace:
    parser = kinds.parser(program, "Write a checkpoint's model for other programs.", EXAMPLES)
    parser.add_argument("checkpoint", type=Path, help="a run (its newest checkpoint), or RUN/checkpoints/step-…")
    formats = "hf: bf16 for transformers; int8: compressed-tensors W8A16 for vLLM; gguf: Q8_0 for llama.cpp"
    parser.add_argument("--format", required=True, choices=("hf", "int8", "gguf"), help=formats)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="an empty folder, or one to make")
    push = "upload the export to the Hugging Face Hub, where you are logged in; a new repository is private"
    parser.add_argument("--push", metavar="REPO", help=push)
    return parser.parse_args(arguments)


def export(options: argparse.Namespace) -> None:
    kinds.fresh_folder(options.out, "--out")
    source = kinds.saved_folder(options.checkpoint)
    if source != options.checkpoint:
        print(f"export: of {source}, the newest checkpoint", flush=True)
    from ..files import upload

    to = None if options.push is None else upload.destination(options.push, f"--push {options.push}")
    if to is not None:
        print(f"push: to {to}", flush=True)
    from ..training import assemble

    assemble.export_checkpoint(source, options.format, options.out)
    if to is not None:
        print(f"push: done, {upload.upload(options.out, to)}", flush=True)


main = door.program("qgalore export", parse, export)
