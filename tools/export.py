"""Export a checkpoint: ``python tools/export.py runs/quickstart/checkpoints/step-00000300 --format int8 --out DIR``."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from qgalore.cli import arguments as kinds
from qgalore.cli import door


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Write a checkpoint's model for other programs.")
    parser.add_argument("checkpoint", type=Path, help="a run (its newest checkpoint), or RUN/checkpoints/step-…")
    formats = "hf: bf16 for transformers; int8: compressed-tensors W8A16 for vLLM; gguf: Q8_0 for llama.cpp"
    parser.add_argument("--format", required=True, choices=("hf", "int8", "gguf"), help=formats)
    parser.add_argument("--out", required=True, type=Path, help="a folder that does not exist yet, or is empty")
    options = parser.parse_args(arguments)
    return door.leave(lambda: export(options))


def export(options: argparse.Namespace) -> None:
    kinds.fresh_folder(options.out, "--out")
    source = kinds.saved_folder(options.checkpoint)
    if source != options.checkpoint:
        print(f"export: of {source}, the newest checkpoint", flush=True)
    from qgalore.training import assemble

    assemble.export_checkpoint(source, options.format, options.out)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
