"""``qgalore evaluate``: multiple choice, held-out loss and lm-eval's tasks, of one model or of two side by side."""

import argparse
import json
from pathlib import Path

from . import arguments as kinds
from . import door

EXAMPLES = """
  %(prog)s runs/quickstart --text held_out.jsonl
  %(prog)s base runs/tuned/export/hf --choices questions.jsonl --shots 5 --tasks arc_easy,hellaswag
"""


def names(text: str) -> list[str]:
    """A kind for argparse: names between commas."""
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def parse(arguments: list[str], program: str) -> argparse.Namespace:
    parser = kinds.parser(program, "Score a model on questions and on text that it was not trained on.", EXAMPLES)
    parser.add_argument(
        "model", type=Path, help="a run (its newest checkpoint), RUN/checkpoints/step-…, or an hf folder"
    )
    parser.add_argument(
        "after", type=Path, nargs="?", help="a second model: both are measured, and a table shows what changed"
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
        "--tasks", type=names, default=[], metavar="A,B", help="tasks of lm-eval, such as arc_easy,hellaswag"
    )
    own = "a folder with task files of your own for lm-eval"
    parser.add_argument("--include-path", type=Path, metavar="DIR", help=own)
    parser.add_argument(
        "--limit",
        type=kinds.whole(1),
        metavar="N",
        help="the first N questions, rows of text or documents of a task only",
    )
    parser.add_argument(
        "--shots",
        type=kinds.whole(0),
        metavar="K",
        help="show K questions with their answers first (a task: its own K)",
    )
    parser.add_argument("--batch", type=kinds.whole(1, 2**20), default=16, metavar="N", help="rows at a time (16)")
    parser.add_argument("--sequence", type=kinds.whole(2, 2**20), default=256, metavar="N", help="tokens a row (256)")
    parser.add_argument("--device", default="cpu", help="cpu (the default) or cuda")
    figures = "where the figures go as JSON (evaluation.json)"
    parser.add_argument("--json", type=Path, default=Path("evaluation.json"), metavar="FILE", help=figures)
    return parser.parse_args(arguments)


def is_checkpoint(source: Path) -> bool:
    """Whether ``source`` is a checkpoint and no hf folder. Raises :class:`ConfigError` if it is neither."""
    from ..errors import ConfigError

    if not (source / "state.json").is_file() and not (source / "config.json").is_file():
        raise ConfigError(
            f"{source} is no run, checkpoint or hf folder; name a folder that a training run or an export wrote"
        )
    return (source / "state.json").is_file()


def check_loads(source: Path) -> None:
    """Raise :class:`ConfigError` for a ``source`` that cannot be loaded, as far as its files tell without their
    weights: the model before it is measured for minutes."""
    import torch

    from ..data.tokenizer import load_tokenizer
    from ..files import checkpoint
    from ..models.loading import pretrained_skeleton

    if is_checkpoint(source):
        checkpoint.read_state(source)
    else:
        pretrained_skeleton(source, dtype=torch.float32)
        load_tokenizer(str(source))


def load(source: Path):
    """(model, tokenizer, a name for what was loaded) of a run, a checkpoint or a Hugging Face folder."""
    from ..data.tokenizer import load_tokenizer
    from ..models.loading import pretrained
    from ..training import assemble

    source = kinds.saved_folder(source)
    if is_checkpoint(source):
        return *assemble.restore_model(source), str(source)
    return pretrained(str(source)), load_tokenizer(str(source)), str(source)


def check_arguments(options: argparse.Namespace) -> None:
    """Raise :class:`ConfigError` for what can be known to be wrong before a model is loaded."""
    from ..errors import ConfigError

    if not (options.choices or options.text or options.instruct or options.tasks):
        raise ConfigError("nothing to evaluate; give --choices, --text, --instruct or --tasks")
    if options.include_path is not None and not options.tasks:
        raise ConfigError("--include-path holds tasks, and none is asked for; give --tasks")
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


def measured(source: Path, manager, options: argparse.Namespace):
    from .measures import measure

    model, tokenizer, name = load(source)
    check_kind([type(model).__name__], source)
    return name, measure(model.to(options.device), tokenizer, manager, options)


def compare(before: Path, after: Path, manager, options: argparse.Namespace) -> dict:
    """Measure both, one in memory at a time, print the table, and return what goes into the JSON file."""
    from ..evaluation.figures import difference, table

    made = [measured(source, manager, options) for source in (before, after)]
    first, second = ([figure for one in found for figure in one.figures] for _, found in made)
    changes = [difference(one, other) for one, other in zip(first, second, strict=True)]
    for column, (name, _) in zip(("before", "after"), made, strict=True):
        print(f"{column + ':':<8}{name}")
    print("\n".join(table(changes)))
    rows = [
        {
            "figure": one.before.name, "before": one.before.value, "after": one.after.value,
            "difference": one.value, "error": one.error,
        }
        for one in changes
    ]  # fmt: skip
    models = [{"model": name, "results": [one.row for one in found]} for name, found in made]
    return {"models": models, "comparison": rows}


def run(options: argparse.Namespace) -> None:
    check_arguments(options)
    sources = [kinds.saved_folder(path) for path in (options.model, options.after) if path is not None]
    for source in sources:
        check_kind(stored_classes(source), source)
    for source in sources[1:]:
        check_loads(source)
    from ..files.atomic import write_report

    manager = None
    if options.tasks:
        from ..evaluation import harness

        manager = harness.find(options.tasks, options.include_path)
    if len(sources) == 2:
        written = compare(*sources, manager, options)
    else:
        name, found = measured(sources[0], manager, options)
        print("\n".join([f"{name}:", *(one.line for one in found)]))
        written = {"model": name, "results": [one.row for one in found]}
    write_report(options.json, json.dumps(written, indent=1) + "\n")
    print(f"written to {options.json}")


main = door.program("qgalore evaluate", parse, run)
