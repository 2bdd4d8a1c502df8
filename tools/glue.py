"""Compare ways to fine-tune a pretrained encoder or decoder on GLUE tasks: methods × rates × seeds, in one table.

    python tools/glue.py --model FOLDER --data GLUE --out runs/glue.jsonl --tasks MRPC --methods adamw qgalore \\
        --rates 5e-5 1e-4 --seeds 0 1 --epochs 3

GLUE holds a folder for each task with train.tsv and dev.tsv. A run of a task, method, rate and seed that the file
already has is not repeated, so the command goes on where it was stopped. Other settings want a file of their own.
``--table`` only prints. ``fira`` and ``muon`` are rules on int8 weights. A low-rank method's matrices have the rate
times a scale, and all else has the rate itself. A method's rate is, among those with the most seeds, the best by its
mean over them on the very set that is reported, for all methods alike. Weights and optimizer state are counted in
bytes; ``--compute bf16`` is autocast's mixed precision, for all methods alike too.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import get_linear_schedule_with_warmup as linear_schedule

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import qgalore
from qgalore.cli import arguments as kinds
from qgalore.cli import door
from qgalore.data.labelled import LabelledTexts, Labels, read_examples
from qgalore.data.order import SampleOrder
from qgalore.data.tokenizer import load_tokenizer
from qgalore.errors import ConfigError
from qgalore.lowrank.optimizer import LowRankOptimizer
from qgalore.models import classify, loading, streaming

METHODS = ("adamw", "lora", "galore", "qgalore", "fira", "muon")


@dataclass(frozen=True)
class Task:
    """Where a task's columns are, and the metric that GLUE compares by."""

    text_keys: tuple[str, ...]
    label_key: str
    metric: str
    header: bool = True
    label_type: str = "class"


TASKS = {
    "CoLA": Task(("3",), "1", "matthews", header=False),
    "MRPC": Task(("#1 String", "#2 String"), "Quality", "accuracy"),
    "QNLI": Task(("question", "sentence"), "label", "accuracy"),
    "RTE": Task(("sentence1", "sentence2"), "label", "accuracy"),
    "SST-2": Task(("sentence",), "label", "accuracy"),
    "STS-B": Task(("sentence1", "sentence2"), "score", "spearman", label_type="number"),
}


class Lora(nn.Module):
    """``Y = X Wᵀ + b + (α/r) · X Aᵀ Bᵀ`` with W and b frozen: A (r, in) random, B (out, r) zero, never merged
    (Hu et al., arXiv 2106.09685)."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), alpha / rank
        self.a = nn.Parameter(torch.empty(rank, base.in_features))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.scale * (x @ self.a.T) @ self.b.T


def add_lora(model: nn.Module, rank: int) -> None:
    """Factors beside every linear layer of the body; the head trains in full, all else is frozen."""
    head = classify.head_names(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in head)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and f"{name}.weight" not in head:
            model.set_submodule(name, Lora(module, rank, alpha=2 * rank))


def optimizer_for(method: str, model: nn.Module, rate: float, options: argparse.Namespace) -> torch.optim.Optimizer:
    """Prepare ``model`` in place as ``method`` asks, and give its optimizer."""
    if method == "lora":
        add_lora(model, options.rank)
    if method in ("adamw", "lora"):
        trained = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, fused=True)
    formats = {"weight_format": "none", "basis_format": "fp32"} if method == "galore" else {}
    qgalore.convert(model, rank=None if method == "muon" else options.rank, **formats)
    settings = {"inner": "adamw" if method == "galore" else "adamw8bit", "update_proj_gap": options.gap}
    if method in ("fira", "muon"):  # clipping waits for all gradients, which these need whole
        settings |= {"rule": method, "full_gradients": "keep"}
    return qgalore.optimizer(model, lr=rate, scale=scale_of(method, options), **settings)


def scale_of(method: str, options: argparse.Namespace) -> float:
    return options.muon_scale if method == "muon" else options.scale


def model_for(options: argparse.Namespace, labels: Labels, pad_id: int, seed: int) -> nn.Module:
    """The pretrained body with a new head that is the same for every method. No code of the folder runs.

    Raises :class:`ConfigError` if the folder cannot be read, or lacks weights of the body."""
    folder = loading.local_folder(options.model)
    config = loading.stored_config(folder, print)
    classify.configure(config, labels.names, pad_id)
    model = loading.skeleton(config, dtype=torch.float32, auto=classify.AUTO)
    tensors = classify.stored_source(folder, model, seed=seed, report=print)
    streaming.allocate(model, torch.device(options.device))
    streaming.fill(model, tensors, "model")
    return model


def data_for(name: str, options: argparse.Namespace) -> tuple[LabelledTexts, LabelledTexts, Labels]:
    """Training and held-out examples of a task, tokenized."""
    task, tokenizer = TASKS[name], load_tokenizer(options.model)
    keys = {"text_keys": task.text_keys, "label_key": task.label_key, "header": task.header}
    train, dev = (read_examples(str(options.data / name / f"{part}.tsv"), **keys) for part in ("train", "dev"))
    labels = Labels.of(train, task.label_type)
    tokenized = (LabelledTexts(rows, labels.encode(rows, name), tokenizer, options.length) for rows in (train, dev))
    return (*tokenized, labels)


def train(name: str, method: str, rate: float, seed: int, options: argparse.Namespace) -> dict:
    """One run, and its record."""
    data, held_out, labels = data_for(name, options)
    model = model_for(options, labels, data.pad_id, seed)
    optimizer = optimizer_for(method, model, rate, options)
    steps = options.steps or max(1, round(options.epochs * len(data) / options.batch))
    schedule = linear_schedule(optimizer, steps // 10, steps)
    order, position = SampleOrder(len(data), seed), (0, 0)
    computing = torch.autocast(options.device, torch.bfloat16, enabled=options.compute == "bf16")
    started = time.perf_counter()
    model.train()
    for step in range(steps):
        torch.manual_seed(seed * 1_000_003 + step)  # the same dropout for every method
        indices, position = order.take(position, options.batch)
        batch = {key: value.to(options.device) for key, value in data.batch(indices).items()}
        with computing:
            loss = classify.classification_loss(model, batch) / len(indices)
        loss.backward()
        if isinstance(optimizer, LowRankOptimizer):
            optimizer.refresh()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"  step {step + 1}/{steps} loss {loss.item():.4f}", flush=True)
    seconds = time.perf_counter() - started
    starts = range(0, len(held_out), options.batch)
    batches = [partial(held_out.batch, range(s, min(s + options.batch, len(held_out)))) for s in starts]
    known = ("pearson", "spearman") if labels.names is None else ("accuracy", "f1", "matthews")
    with computing:
        found = classify.evaluate(model, batches, known, torch.device(options.device))
    record = {"task": name, "method": method, "rate": rate, "seed": seed, "steps": steps, "batch": options.batch}
    settings = {key: getattr(options, key) for key in ("rank", "gap", "length", "compute")}
    settings["scale"] = scale_of(method, options)
    measured = {"seconds": round(seconds, 1), "bytes": held_bytes(model, optimizer)}
    return {**record, **settings, **measured, **found.row()}


def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the weights (frozen ones, scales and bases too) and of the optimizer's state."""
    held = [*model.parameters(), *model.buffers(), *tensors_in(optimizer.state_dict())]
    return sum(tensor.nbytes for tensor in held if tensor.numel() > 1)  # one zero stands for a probe


def tensors_in(state: object) -> Iterator[torch.Tensor]:
    """The tensors in nested dictionaries and lists."""
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict | list | tuple):
        for value in state.values() if isinstance(state, dict) else state:
            yield from tensors_in(value)


def table(records: list[dict]) -> str:
    """Markdown: for every task and method the best rate by its mean over seeds, with the lowest and highest seed."""
    lines = [
        "| task | metric | method | rate | mean | lowest – highest | seeds | MB | minutes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, method in itertools.product(TASKS, METHODS):
        runs: dict[float, list[dict]] = {}
        for record in records:
            if (record["task"], record["method"]) == (name, method):
                runs.setdefault(record["rate"], []).append(record)
        scored = {rate: [r[f"eval_{TASKS[name].metric}"] or 0.0 for r in group] for rate, group in runs.items()}
        if scored:
            rate, best = max(scored.items(), key=lambda item: (len(item[1]), statistics.fmean(item[1])))
            minutes = statistics.median(record["seconds"] for record in runs[rate]) / 60
            score = [f"{statistics.fmean(best):.4f}", f"{min(best):.4f} – {max(best):.4f}", str(len(best))]
            cost = [f"{runs[rate][0]['bytes'] / 1e6:.1f}", f"{minutes:.1f}"]
            lines.append("| " + " | ".join([name, TASKS[name].metric, method, f"{rate:g}", *score, *cost]) + " |")
    return "\n".join(lines)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a pretrained folder or hub id")
    parser.add_argument("--data", type=Path, help="the folder of the tasks' folders")
    parser.add_argument("--out", type=Path, required=True, help="records, one JSON line a run")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["MRPC"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rates", nargs="+", type=kinds.real(1e-12, 100), default=[5e-5, 1e-4, 2e-4])
    parser.add_argument("--seeds", nargs="+", type=kinds.whole(0), default=[0, 1])
    parser.add_argument("--epochs", type=kinds.real(1e-3, 1e6), default=3.0)
    parser.add_argument("--steps", type=kinds.whole(1), help="instead of epochs")
    parser.add_argument("--batch", type=kinds.whole(1), default=16)
    parser.add_argument("--length", type=kinds.whole(1), default=128, help="tokens; longer examples are cut")
    parser.add_argument("--rank", type=kinds.whole(1), default=32, help="of lora, galore, qgalore and fira")
    parser.add_argument("--scale", type=kinds.real(1e-6, 1e6), default=4.0, help="of galore, qgalore and fira")
    parser.add_argument("--muon-scale", type=kinds.real(1e-6, 1e6), default=1.0, help="of muon")
    parser.add_argument("--gap", type=kinds.whole(1), default=25, help="steps between refreshes of a subspace")
    parser.add_argument("--compute", choices=("fp32", "bf16"), default="fp32", help="of the products")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--table", action="store_true", help="print the table of --out and stop")
    options = parser.parse_args(arguments)
    if not options.table and (options.model is None or options.data is None):
        parser.error("--model and --data are needed, unless with --table")
    return options


def read_records(path: Path) -> list[dict]:
    """The records of runs that are done. Raises :class:`ConfigError` for a line that is none."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    records = []
    for place, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            complete = {"task", "method", "rate", "seed", "seconds", "bytes"} <= record.keys()
        except (ValueError, AttributeError):
            complete = False
        if not complete:
            raise ConfigError(f"--out {path}, line {place}, is no record of a run. Delete it or name another file.")
        records.append(record)
    return records


def main(arguments: list[str]) -> int:
    return door.leave(lambda: compare(parse(arguments)))


def compare(options: argparse.Namespace) -> None:
    records = read_records(options.out)
    done = {(r["task"], r["method"], r["rate"], r["seed"]) for r in records}
    runs = itertools.product(options.tasks, options.seeds, options.rates, options.methods)
    for name, seed, rate, method in runs if not options.table else ():
        if (name, method, rate, seed) in done:
            continue
        print(f"{name} {method} rate {rate:g} seed {seed}", flush=True)
        records.append(train(name, method, rate, seed, options))
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(records[-1]) + "\n")
    print(table(records))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
