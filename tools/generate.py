"""A first look at an exported model: ``python tools/generate.py runs/quickstart/export/hf --prompt "It was"``."""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Continue a prompt with an exported model.")
    parser.add_argument("folder", help="a Hugging Face folder, such as runs/NAME/export/hf")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token every time")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if not (Path(options.folder) / "config.json").is_file():
        print(f"error: {options.folder} is not an exported model: it has no config.json", file=sys.stderr)
        return 2
    from qgalore.data.tokenizer import load_tokenizer
    from qgalore.errors import ConfigError
    from qgalore.models.loading import pretrained

    try:
        model, tokenizer = pretrained(options.folder), load_tokenizer(options.folder)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    ids = tokenizer(options.prompt, return_tensors="pt")
    if not ids["input_ids"].numel():
        print("error: --prompt is empty; give at least one word", file=sys.stderr)
        return 2
    torch.manual_seed(options.seed)
    sampling = {"do_sample": True, "temperature": options.temperature} if options.temperature > 0 else {}
    output = model.generate(**ids, max_new_tokens=options.max_new_tokens, **sampling)
    print(tokenizer.decode(output[0], skip_special_tokens=True))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
