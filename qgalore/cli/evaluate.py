"""``qgalore evaluate``: multiple choice and held-out loss of a run, a checkpoint or an exported model."""

import argparse
import json
import math
import tempfile
from pathlib import Path

from . import arguments as kinds
from . import door

EXAMPLES = """
  %(prog)s runs/quickstart --text held_out.jsonl
  %(prog)s runs/quickstart/export/hf --choices questions.jsonl --shots 5 --json figures.json
"""


def parse(arguments: list[str], program: str) -> argparse.Namespace:
    parser = kinds.parser(program, "Score a model on questions and on text that it was not trained on.", EXAMPLES)
    parser.add_argument(
        "model", type=Path, help="a run (its newest checkpoint), RUN/checkpoints/step-…, or an hf folder"
    )
    parser.add_argument("--choices", nargs="+", default=[], metavar="FILE", help=".jsonl: question, choices, answer")
    parser.add_argument(
        "--text", nargs="+", default=[], metavar="FILE", help="loss over text, as data.task=text reads it"
    )
    parser.add_argument("--text-key", default="text", metavar="KEY", help="the key of a row of --text with its text")
    parser.add_argument(
        "--instruct", nargs="+", default=[], metavar="FILE", help="loss over the answers of conversations"
    )
    parser.add_argument(
        "--limit", type=kinds.whole(1), metavar="N", help="ask the first N questions only, read N rows of text only"
    )
    parser.add_argument(
        "--shots", type=kinds.whole(0), default=0, metavar="K", help="show the first K questions with their answers"
    )
    parser.add_argument("--batch", type=kinds.whole(1, 2**20), default=16, metavar="N", help="rows at a time (16)")
    parser.add_argument("--sequence", type=kinds.whole(2, 2**20), default=256, metavar="N", help="tokens a row (256)")
    parser.add_argument("--device", default="cpu", help="cpu (the default) or cuda")
    figures = "where the figures go as JSON (evaluation.json)"
    parser.add_argument("--json", type=Path, default=Path("evaluation.json"), metavar="FILE", help=figures)
    return parser.parse_args(arguments)


def load(source: Path):
    """(model, tokenizer, a name for what was loaded) of a run, a checkpoint or a Hugging Face folder."""
    from ..data.tokenizer import load_tokenizer
    from ..errors import ConfigError
    from ..models.loading import pretrained
    from ..training import assemble

    source = kinds.saved_folder(source)
    if (source / "state.json").is_file():
        return *assemble.restore_model(source), str(source)
    if not (source / "config.json").is_file():
        raise ConfigError(
            f"{source} is no run, checkpoint or hf folder; name a folder that a training run or an export wrote"
        )
    return pretrained(str(source)), load_tokenizer(str(source)), str(source)


def ask(model, tokenizer, path: str, options: argparse.Namespace) -> dict:
    from ..evaluation import multiple_choice

    questions = multiple_choice.with_examples(multiple_choice.read_questions(path), options.shots)[: options.limit]
    made = multiple_choice.score(model, tokenizer, questions, batch_size=options.batch)
    if made.cut:
        print(f"note: {path}: {made.cut} prompts lost their beginning to fit the model's positions")
    raw, per_byte = made.accuracy, made.accuracy_per_byte
    return {
        "kind": "choices", "file": path, "questions": len(questions), "shots": options.shots, "chance": made.chance,
        "accuracy": raw, "accuracy_error": made.standard_error(raw),
        "accuracy_per_byte": per_byte, "accuracy_per_byte_error": made.standard_error(per_byte),
    }  # fmt: skip


def held_out(model, tokenizer, path: str, options: argparse.Namespace, kind: str) -> dict:
    from functools import partial

    import torch

    from ..data.chat import PLAIN_TEMPLATE, has_template
    from ..data.instruct import conversations_to_disk
    from ..data.packing import PackedSequences
    from ..data.tokens import tokenize_to_disk
    from ..errors import ConfigError
    from ..evaluation.loss import evaluate
    from ..models.loss import summed_loss, target_tokens

    length = min(options.sequence, getattr(model.config, "max_position_embeddings", None) or options.sequence)
    if length < options.sequence:
        print(f"note: --sequence {options.sequence} is more than the model's {length} positions, which are used")
    read = partial(tokenize_to_disk, text_key=options.text_key)
    if kind == "instruct":
        read = partial(conversations_to_disk, sequence_length=length)
        if not has_template(tokenizer):
            tokenizer.chat_template = PLAIN_TEMPLATE
            print("note: the tokenizer has no chat template; conversations are written in a plain one")
    with tempfile.TemporaryDirectory() as cache:
        tokens = read(path, tokenizer, cache_dir=cache, report=lambda line: None)
        if tokens.row_length is None and len(tokens.tokens) <= length:
            raise ConfigError(
                f"{path} has {len(tokens.tokens)} tokens, and a row of --sequence {length} needs one more than that; "
                "give more text or a shorter --sequence"
            )
        packed = PackedSequences(tokens, sequence_length=length)
        count = min(len(packed), options.limit or len(packed))
        starts = range(0, count, options.batch)
        batches = [partial(packed.batch, range(s, min(s + options.batch, count))) for s in starts]
        made = evaluate(model, batches, summed_loss, target_tokens, torch.device(options.device))
    if not made.tokens or not math.isfinite(made.loss):
        found = "no token whose loss counts" if not made.tokens else f"a loss of {made.loss}"
        remedy = "give more text" if not made.tokens else "the model's weights or products are not finite"
        raise ConfigError(f"{path}: {found}; {remedy}")
    return {"kind": kind, "file": path, "tokens": made.tokens, "loss": made.loss, "perplexity": made.perplexity}


def show(results: list[dict]) -> None:
    for one in results:
        name = Path(one["file"]).name
        if one["kind"] == "choices":
            print(
                f"{name:<32} accuracy {one['accuracy']:.3f} ± {one['accuracy_error']:.3f} | by byte "
                f"{one['accuracy_per_byte']:.3f} ± {one['accuracy_per_byte_error']:.3f} | chance {one['chance']:.3f} | "
                f"{one['questions']} questions, {one['shots']} shots"
            )
        else:
            what = "answers of conversations" if one["kind"] == "instruct" else "text"
            figures = f"loss {one['loss']:.4f} | perplexity {one['perplexity']:.2f}"
            print(f"{name:<32} {figures} | {one['tokens']:,} tokens of {what}")


def check_arguments(options: argparse.Namespace) -> None:
    """Raise :class:`ConfigError` for what can be known to be wrong before a model is loaded."""
    from ..errors import ConfigError

    if not (options.choices or options.text or options.instruct):
        raise ConfigError("nothing to evaluate; give --choices, --text or --instruct")
    if not options.json.parent.is_dir() or options.json.is_dir():
        raise ConfigError(f"--json {options.json} cannot be written: name a file in a folder that exists")
    kinds.check_device(options.device)


def check_kind(names: list[str], source: Path) -> None:
    """Raise :class:`ConfigError` if a model of one of these classes does not continue text."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from ..errors import ConfigError

    if names and not set(names) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        what = "a classifier" if "Classification" in names[0] else f"a {names[0]}"
        raise ConfigError(
            f"{source} holds {what}, which continues no text and so has no loss on it. Name a language model; a "
            "classifier's own metrics are in its run's metrics.jsonl"
        )


def stored_classes(source: Path) -> list[str]:
    """What an hf folder says its model's class is; empty for another folder, or where it says nothing."""
    try:
        found = json.loads((source / "config.json").read_text(encoding="utf-8")).get("architectures")
    except (OSError, ValueError, AttributeError):
        return []
    return found if isinstance(found, list) and all(isinstance(name, str) for name in found) else []


def run(options: argparse.Namespace) -> None:
    check_arguments(options)
    from ..files.atomic import write_report

    source = kinds.saved_folder(options.model)
    check_kind(stored_classes(source), source)
    model, tokenizer, name = load(source)
    check_kind([type(model).__name__], source)
    model.to(options.device)
    results = [ask(model, tokenizer, path, options) for path in options.choices]
    for kind, paths in (("text", options.text), ("instruct", options.instruct)):
        results += [held_out(model, tokenizer, path, options, kind) for path in paths]
    print(f"{name}:")
    show(results)
    write_report(options.json, json.dumps({"model": name, "results": results}, indent=1) + "\n")
    print(f"written to {options.json}")


def main(arguments: list[str], program: str = "qgalore evaluate") -> int:
    options = parse(arguments, program)
    return door.leave(lambda: run(options))
