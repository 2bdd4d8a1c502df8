"""Multiple choice and held-out loss: ``python tools/evaluate.py runs/NAME --choices FILE --text FILE``."""

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Score a model on questions and on text that it was not trained on.")
    parser.add_argument(
        "model", type=Path, help="a run (its newest checkpoint), RUN/checkpoints/step-…, or an hf folder"
    )
    parser.add_argument("--choices", nargs="+", default=[], metavar="FILE", help=".jsonl: question, choices, answer")
    parser.add_argument(
        "--text", nargs="+", default=[], metavar="FILE", help="loss over text, as data.task=text reads it"
    )
    parser.add_argument(
        "--instruct", nargs="+", default=[], metavar="FILE", help="loss over the answers of conversations"
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="ask the first N questions only, read N rows of text only"
    )
    parser.add_argument(
        "--shots", type=int, default=0, metavar="K", help="show the first K questions with their answers"
    )
    parser.add_argument("--batch", type=int, default=16, help="rows at a time")
    parser.add_argument("--sequence", type=int, default=256, help="tokens in a row of text")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, default=Path("evaluation.json"), help="where the figures go as JSON")
    return parser.parse_args(arguments)


def load(source: Path):
    """(model, tokenizer, a name for what was loaded) of a run, a checkpoint or a Hugging Face folder."""
    from qgalore import build, checkpoint
    from qgalore.data.tokenizer import load_tokenizer
    from qgalore.errors import ConfigError
    from qgalore.models.loading import pretrained

    if (source / "checkpoints").is_dir():
        found = checkpoint.steps_in(source / "checkpoints")
        if not found:
            raise ConfigError(f"{source} has no checkpoint yet; let it save one, or name another run")
        source = found[-1]
    if (source / "state.json").is_file():
        return *build.restore_model(source), str(source)
    if not (source / "config.json").is_file():
        raise ConfigError(
            f"{source} is no run, checkpoint or hf folder; name a folder that train.py or an export wrote"
        )
    return pretrained(str(source)), load_tokenizer(str(source)), str(source)


def ask(model, tokenizer, path: str, options: argparse.Namespace) -> dict:
    from qgalore import choices

    questions = choices.with_examples(choices.read_questions(path), options.shots)[: options.limit]
    made = choices.score(model, tokenizer, questions, batch_size=options.batch)
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

    from qgalore.data.chat import PLAIN_TEMPLATE, has_template
    from qgalore.data.instruct import conversations_to_disk
    from qgalore.data.packing import PackedSequences
    from qgalore.data.tokens import tokenize_to_disk
    from qgalore.evaluate import evaluate
    from qgalore.models.loss import summed_loss, target_tokens

    length = min(options.sequence, getattr(model.config, "max_position_embeddings", None) or options.sequence)
    read = tokenize_to_disk
    if kind == "instruct":
        read = partial(conversations_to_disk, sequence_length=length)
        if not has_template(tokenizer):
            tokenizer.chat_template = PLAIN_TEMPLATE
            print("note: the tokenizer has no chat template; conversations are written in a plain one")
    with tempfile.TemporaryDirectory() as cache:
        tokens = read(path, tokenizer, cache_dir=cache, report=lambda line: None)
        packed = PackedSequences(tokens, sequence_length=length)
        count = min(len(packed), options.limit or len(packed))
        starts = range(0, count, options.batch)
        batches = [partial(packed.batch, range(s, min(s + options.batch, count))) for s in starts]
        made = evaluate(model, batches, summed_loss, target_tokens, torch.device(options.device))
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


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    import torch

    from qgalore.errors import ConfigError

    try:
        if options.device != "cpu" and not torch.cuda.is_available():
            raise ConfigError(f"--device {options.device}: PyTorch sees no CUDA device here; leave it out")
        if not (options.choices or options.text or options.instruct):
            raise ConfigError("nothing to evaluate; give --choices, --text or --instruct")
        if any(value is not None and value < 1 for value in (options.limit, options.batch, options.sequence)):
            raise ConfigError("--limit, --batch and --sequence must be at least 1")
        model, tokenizer, name = load(options.model)
        model.to(options.device)
        results = [ask(model, tokenizer, path, options) for path in options.choices]
        for kind, paths in (("text", options.text), ("instruct", options.instruct)):
            results += [held_out(model, tokenizer, path, options, kind) for path in paths]
        print(f"{name}:")
        show(results)
        options.json.write_text(json.dumps({"model": name, "results": results}, indent=1) + "\n", encoding="utf-8")
        print(f"written to {options.json}")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"error: {options.json} could not be written: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
