"""The model card of a run's export: what the weights are, how they came to be, and how they are loaded."""

import json
import math
from pathlib import Path
from typing import Any

import torch
import transformers

from ..combinations import RULES
from ..config import METHODS, Config
from ..convergence.charts import loss_picture, points_of
from ..convergence.records import Run, number, read_run
from ..errors import ConfigError, counted
from ..files.model_card import ModelCard, code
from ..memory.plan import human
from . import origins
from .position import Position

FORMATS = {"hf": "bf16", "int8": "int8, in the compressed-tensors format"}  # those whose folders have a card


def of(fmt: str, config: Config, position: Position, folder: Path) -> ModelCard:
    """The card of the weights after ``position``, exported in ``fmt`` from the run of ``folder``, whose records, plan
    and origins it shows."""
    run, known = _records(folder), origins.read(folder)
    return ModelCard(
        name=config.run.name,
        header=_header(config, known),
        rows=[
            *_of_origins(config, known),
            ("weights", FORMATS[fmt]),
            ("method", method(config)),
            *_of_course(config, position, run),
            *_of_plan(folder),
            ("versions", f"qgalore {_version()}, torch {torch.__version__}, transformers {transformers.__version__}"),
        ],
        usage=_usage(config),
        notes=[
            "Put the path of this folder, or its id on the hub, in the place of FOLDER.",
            *(
                ["The format is vLLM's. transformers reads it too, after `pip install compressed-tensors`."]
                if fmt == "int8"
                else []
            ),
        ],
        picture=_picture(run, position),
    )


def _picture(run: Run, position: Position) -> str:
    known = [(run.train, "loss"), (run.evaluations, "eval_loss")]
    lines = [[point for point in points_of(rows, key) if point[0] <= position.step] for rows, key in known]
    return loss_picture(*lines) if any(lines) else ""


def _records(folder: Path) -> Run:
    """Those of the run; none if its checkpoint was moved elsewhere without them."""
    try:
        return read_run(folder)
    except ConfigError:
        return Run(folder, folder.name, {}, [], [], [], 0)


def method(config: Config) -> str:
    """How the weights were trained, in one line."""
    low, optimizer = config.lowrank, config.train.optimizer or METHODS[config.method][3]
    if not METHODS[config.method][0]:
        return f"{code(config.method)}: all weights in {config.model.dtype}, {optimizer}"
    weights = "int8 weights" if low.weight_format == "int8" else f"weights in {config.model.dtype}"
    if config.method == "lora":
        return f"`lora`: {weights}, factors of rank {low.rank}, {optimizer}"
    basis = f", {low.basis_format} bases of rank {low.rank}" if RULES[low.rule].uses_basis else ""
    return f"{code(config.method)}: {weights}{basis}, rule {low.rule}, {optimizer}"


def _header(config: Config, known: dict[str, Any]) -> dict[str, Any]:
    base, labels = known.get("base_id"), config.data.task == "classify"
    return {
        "library_name": "transformers",
        **({"base_model": base} if isinstance(base, str) and origins.is_id(base) else {}),
        **known.get("licence", {}),
        **({"datasets": known["datasets"]} if known.get("datasets") else {}),
        "pipeline_tag": "text-classification" if labels else "text-generation",
        "tags": ["qgalore", config.method],
    }


def _of_origins(config: Config, known: dict[str, Any]) -> list[tuple[str, str]]:
    base, licence = known.get("base"), known.get("licence", {})
    rows = []
    if base is not None:
        rows.append(("base model", code(base)))
    elif known.get("architecture") is not None:
        rows.append(("base model", f"none: trained from scratch, with the architecture {code(known['architecture'])}"))
    if base is not None:
        stated = licence.get("license_name") or licence.get("license")
        rows.append(("licence of the base", code(stated) if stated else "not stated beside it"))
    held_out = ", ".join(map(code, known.get("held_out", [])))
    if not held_out:
        held_out = f"the last {config.data.valid_fraction:.3g} of the training data"
    return [
        *rows,
        ("training data", ", ".join(map(code, known.get("train", []))) or "not noted"),
        ("held-out data", held_out),
        ("task", code(config.data.task)),
    ]


def _of_course(config: Config, position: Position, run: Run) -> list[tuple[str, str]]:
    train = config.train
    samples = counted(train.micro_batch_size * train.grad_accumulation, "row")
    rows = [
        ("steps", f"{position.step:,}, of {samples} of up to {config.data.sequence_length:,} tokens each"),
        ("learned tokens" if config.data.task != "classify" else "examples", f"{position.tokens:,}"),
        ("learning rate", f"{train.lr:g} at its peak, {train.lr_schedule}"),
    ]
    if position.steps_before:
        before = counted(position.steps_before, "step")
        rows.insert(0, ("earlier steps", f"{before} of another run, whose data are not named here"))
    evaluations = [row for row in run.evaluations if row["step"] <= position.step]
    if evaluations:
        last = evaluations[-1]
        figures = [(key.removeprefix("eval_"), number(last, key)) for key in last if key.startswith("eval_")]
        shown = ", ".join(f"{name} {value:.4f}" for name, value in figures if value is not None)
        rows.append(("held-out figures", f"{shown} (after step {last['step']:,})"))
    if position.best_loss is not None and math.isfinite(position.best_loss):
        rows.append(("best held-out loss", f"{position.best_loss:.4f} (after step {position.best_step:,})"))
    return rows


def _of_plan(folder: Path) -> list[tuple[str, str]]:
    """The planned bytes, largest first. What the process had before is no matter of the model."""
    try:
        found = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        sizes = {name: size for part in ("resident", "transient") for name, size in found[part].items() if size > 0}
        total, largest = sum(sizes.values()), sorted(sizes.items(), key=lambda item: -item[1])[:4]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # a run of an older version
        return []
    parts = ", ".join(f"{name} {human(size)}" for name, size in largest)
    return [("planned memory", f"{human(total)} at the peak, most of it {parts}")]


def _usage(config: Config) -> str:
    labels = config.data.task == "classify"
    kind = "AutoModelForSequenceClassification" if labels else "AutoModelForCausalLM"
    lines = [
        f"from transformers import {kind}, AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
        f'model = {kind}.from_pretrained("FOLDER", dtype="auto")',
    ]
    return "\n".join(lines)


def _version() -> str:
    import qgalore

    return qgalore.__version__
