"""``qgalore generate``: a first look at an exported model."""

import argparse
from pathlib import Path
from typing import Any

from . import arguments as kinds
from . import door

EXAMPLES = """
  %(prog)s runs/quickstart/export/hf --prompt "It was"
  %(prog)s runs/quickstart/export/hf --prompt "It was" --temperature 0 --max-new-tokens 20
"""

COLDEST = 1e-4  # of --temperature, but for 0


def parse(arguments: list[str], program: str) -> argparse.Namespace:
    parser = kinds.parser(program, "Continue a prompt with an exported model.", EXAMPLES)
    parser.add_argument("folder", type=Path, help="a Hugging Face folder, such as runs/NAME/export/hf")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the beginning to continue")
    tokens = kinds.whole(1, 2**20)
    parser.add_argument("--max-new-tokens", type=tokens, default=100, metavar="N", help="how many at most (100)")
    add_drawing(parser)
    return parser.parse_args(arguments)


def add_drawing(parser: argparse.ArgumentParser) -> None:
    """Options that say how the next token is drawn; see :func:`drawing`."""
    likeliest = "0 takes the likeliest token every time (0.8)"
    parser.add_argument("--temperature", type=kinds.real(0, 100), default=0.8, metavar="T", help=likeliest)
    nucleus = "draw among the likeliest tokens with this probability together (as generation_config.json says)"
    parser.add_argument("--top-p", type=kinds.real(1e-6, 1), metavar="P", help=nucleus)
    parser.add_argument("--seed", type=kinds.whole(0, 2**63 - 1), default=0, metavar="N", help="of the draws (0)")


def drawing(options: argparse.Namespace) -> dict[str, Any]:
    """What transformers' ``generate`` calls these options. Raises :class:`ConfigError` for a temperature too low."""
    from ..errors import ConfigError

    if 0 < options.temperature < COLDEST:
        raise ConfigError(
            f"--temperature is {options.temperature:g}, by which the scores of the tokens can no longer be divided; "
            f"give 0 for the likeliest token, or at least {COLDEST}"
        )
    if options.temperature == 0:
        return {"do_sample": False}
    nucleus = {} if options.top_p is None else {"top_p": options.top_p}
    return {"do_sample": True, "temperature": options.temperature, **nucleus}


def check_folder(folder: Path) -> None:
    """Raise :class:`ConfigError` for a folder that is no exported model, naming the export if it is a run."""
    from ..errors import ConfigError

    if (folder / "config.json").is_file():
        return
    run = folder.parent.parent if folder.parent.name == kinds.CHECKPOINTS else folder
    export = run / "export" / "hf"
    remedy = f"Name {export}." if export.is_dir() else "Name a Hugging Face folder, such as runs/NAME/export/hf."
    if not export.is_dir() and (run / kinds.CHECKPOINTS).is_dir():
        remedy = f"Export it first with qgalore export {folder} --format hf --out DIR."
    raise ConfigError(f"{folder} is not an exported model: it has no config.json. {remedy}")


def load(folder: Path):
    from ..data.tokenizer import load_tokenizer
    from ..models.loading import pretrained

    return pretrained(str(folder)), load_tokenizer(str(folder))


def generate(options: argparse.Namespace) -> None:
    sampling = drawing(options)
    check_folder(options.folder)
    import torch

    from ..errors import ConfigError, printable

    model, tokenizer = load(options.folder)
    # What the shell passed on and is no UTF-8 arrives as lone surrogates, which no tokenizer reads.
    ids = tokenizer(options.prompt.encode("utf-8", "replace").decode(), return_tensors="pt")
    if not ids["input_ids"].numel():
        raise ConfigError("--prompt is empty; give at least one word")
    room = getattr(model.config, "max_position_embeddings", None)
    length = ids["input_ids"].shape[1] + options.max_new_tokens
    if room is not None and length > room:
        raise ConfigError(
            f"--max-new-tokens: {options.max_new_tokens} behind a prompt of {ids['input_ids'].shape[1]} tokens is more "
            f"than the model's {room} positions; lower it"
        )
    torch.manual_seed(options.seed)
    output = model.generate(**ids, max_new_tokens=options.max_new_tokens, **sampling)
    print(printable(tokenizer.decode(output[0], skip_special_tokens=True)))


main = door.program("qgalore generate", parse, generate)
