"""Export a checkpoint: ``python tools/export.py runs/quickstart/checkpoints/step-00000300 --format int8 --out DIR``."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Write a checkpoint's model for other programs.")
    parser.add_argument("checkpoint", type=Path, help="RUN/checkpoints/step-…")
    formats = "hf: bf16 for transformers; int8: compressed-tensors W8A16 for vLLM; gguf: Q8_0 for llama.cpp"
    parser.add_argument("--format", required=True, choices=("hf", "int8", "gguf"), help=formats)
    parser.add_argument("--out", required=True, type=Path, help="a folder that does not exist yet, or is empty")
    options = parser.parse_args(arguments)
    from qgalore import build
    from qgalore.errors import ConfigError

    try:
        if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
            raise ConfigError(f"--out {options.out} exists and is not an empty folder; choose another")
        build.export_checkpoint(options.checkpoint, options.format, options.out)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
