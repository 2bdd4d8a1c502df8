"""What ``qgalore evaluate`` measures of one model: each measurement as a row for the JSON file and as figures."""

import argparse
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..evaluation.figures import Figure


@dataclass(frozen=True)
class Measured:
    """``row``: for evaluation.json, with all that is known; ``line``: for a reader; ``figures``: for a comparison."""

    row: dict[str, Any]
    line: str
    figures: tuple[Figure, ...]


def ask(model, tokenizer, path: str, options: argparse.Namespace) -> Measured:
    from ..evaluation import multiple_choice

    shots = options.shots or 0
    questions = multiple_choice.with_examples(multiple_choice.read_questions(path), shots)[: options.limit]
    made = multiple_choice.score(model, tokenizer, questions, batch_size=options.batch)
    if made.cut:
        print(f"note: {path}: {made.cut} prompts lost their beginning to fit the model's positions")
    raw, per_byte = made.accuracy, made.accuracy_per_byte
    row = {
        "kind": "choices", "file": path, "questions": len(questions), "shots": shots, "chance": made.chance,
        "accuracy": raw, "accuracy_error": made.standard_error(raw),
        "accuracy_per_byte": per_byte, "accuracy_per_byte_error": made.standard_error(per_byte),
    }  # fmt: skip
    name, count = Path(path).name, len(questions)
    figures = (
        Figure(f"{name} accuracy", raw, count, row["accuracy_error"], made.right()),
        Figure(f"{name} by byte", per_byte, count, row["accuracy_per_byte_error"], made.right(per_byte=True)),
    )
    line = (
        f"{name:<32} accuracy {figures[0]} | by byte {figures[1]} | chance {made.chance:.3f} | "
        f"{count} questions, {shots} shots"
    )
    return Measured(row, line, figures)


def held_out(model, tokenizer, path: str, options: argparse.Namespace, kind: str) -> Measured:
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
        over = tokens.digest()
        count = min(len(packed), options.limit or len(packed))
        starts = range(0, count, options.batch)
        batches = [partial(packed.batch, range(s, min(s + options.batch, count))) for s in starts]
        made = evaluate(model, batches, summed_loss, target_tokens, torch.device(options.device))
    if not made.tokens or not math.isfinite(made.loss):
        found = "no token whose loss counts" if not made.tokens else f"a loss of {made.loss}"
        remedy = "give more text" if not made.tokens else "the model's weights or products are not finite"
        raise ConfigError(f"{path}: {found}; {remedy}")
    row = {"kind": kind, "file": path, "tokens": made.tokens, "loss": made.loss, "perplexity": made.perplexity}
    name, what = Path(path).name, "answers of conversations" if kind == "instruct" else "text"
    line = f"{name:<32} loss {made.loss:.4f} | perplexity {made.perplexity:.2f} | {made.tokens:,} tokens of {what}"
    return Measured(row, line, (Figure(f"{name} loss", made.loss, made.tokens, digits=4, over=over),))


def of_tasks(model, tokenizer, manager, options: argparse.Namespace) -> list[Measured]:
    from ..evaluation import harness

    settings = {"batch_size": options.batch, "limit": options.limit, "shots": options.shots}
    made = []
    for one in harness.run(model, tokenizer, options.tasks, manager, **settings):
        shots = "" if one.shots is None else f", {one.shots} shots"
        line = f"{one.figure.name:<32} {one.figure} | {one.figure.items:,} samples{shots} (lm-eval)"
        made.append(Measured(one.row(), line, (one.figure,)))
    return made


def measure(model, tokenizer, manager, options: argparse.Namespace) -> list[Measured]:
    """All that ``options`` ask for. ``manager``: lm-eval's, or None without tasks."""
    found = [ask(model, tokenizer, path, options) for path in options.choices]
    for kind, paths in (("text", options.text), ("instruct", options.instruct)):
        found += [held_out(model, tokenizer, path, options, kind) for path in paths]
    return found + (of_tasks(model, tokenizer, manager, options) if options.tasks else [])
