"""Train large configurations for a few steps on a GPU, each held to its budget, and set what happened beside its plan:

    python tools/prove_gpu.py --out DIR [--only 7b 7b-int8 …] [--steps 8] [--minutes 10]
    python tools/prove_gpu.py --out DIR --cpu        # the same script on small shapes, to see that it works

``qgalore doctor`` comes first, and where it finds a wrong kernel nothing is trained. Each case is a process of its own,
with ``kernels=triton`` and at most 15.5 GiB. Its row is kept in DIR/NAME.json and its checkpoints are deleted. Given
the same DIR again, the script goes on with the cases that have no row. It starts none after ``--minutes``, and ends one
that takes longer.

The text is the quickstart's; a case starts from random weights. Columns, in GiB: ``plan`` the planned peak,
``allocated`` and ``reserved`` what PyTorch measured (without the CUDA context, which the plan assumes). ``first`` is
the first step, which finds all bases, in seconds. tokens/s and ms are medians over the steps of the second half.
``useful`` counts the matrix products that the method cannot do without (tools/bench.py), as a share of what a large
bf16 product reaches here.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from qgalore.cli import arguments as kinds
from qgalore.cli import door

ROOT = Path(__file__).resolve().parent.parent

GIB = 2**30

CASES = {
    "7b": ("llama7b_16gb.yaml",),
    "7b-4-sequences": ("llama7b_16gb.yaml", "train.grad_accumulation=4", "train.stepping=deferred"),
    "7b-int8": ("llama7b_16gb.yaml", "model.compute=int8", "lowrank.group_size=row"),
    "llama3-8b": ("llama3_8b_16gb.yaml",),
    "7b-flex": ("llama7b_16gb.yaml", "model.attention=flex"),
    "7b-plain": ("llama7b_16gb.yaml", "model.elementwise=plain"),
    "7b-rank-256": ("llama7b_16gb.yaml", "lowrank.rank=256"),
    "7b-12gb": ("llama7b_12gb.yaml",),
    "13b": ("llama13b_16gb.yaml",),
}
# What ten minutes hold, in the order of its worth. The last two are 7b with other code in one place each.
USUAL = ("7b", "7b-4-sequences", "7b-int8", "llama3-8b", "7b-flex", "7b-plain")
SMALL = (
    "model.overrides.num_hidden_layers=2",
    "model.overrides.hidden_size=64",
    "model.overrides.intermediate_size=128",
    "model.overrides.num_attention_heads=4",
    "model.overrides.num_key_value_heads=4",
    "data.sequence_length=64",
    "lowrank.rank=16",
    "kernels=auto",
    "memory.budget=null",
)


def settings(folder: Path, name: str, steps: int, device: str) -> list[str]:
    text = ROOT / "configs" / "quickstart_data"
    changes = {
        "device": device,
        "kernels": "triton",
        "memory.budget": "15.5GiB",
        "run.dir": folder,
        "run.name": name,
        "data.train": text / "train.jsonl.gz",
        "data.valid": text / "valid.jsonl.gz",
        "data.tokenizer": "null",
        "data.vocab_size": 4096,
        "data.cache_dir": folder / "cache",
        "train.max_steps": steps,
        "train.epochs": "null",
        "train.warmup_steps": 2,
        "train.warmup_ratio": "null",
        "train.eval_every": steps,
        "train.eval_batches": 1,
        "train.save_every": "null",
        "train.keep_last": 1,
        "export.formats": "[]",
        "sample.max_new_tokens": 0,
    }
    return [f"{key}={value}" for key, value in changes.items()]


def matmul_limit(device: str, size: int) -> float:
    """FLOP per second of one large bf16 product: the best of ten after two to warm up."""
    import torch

    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for attempt in range(12):
        started = time.perf_counter()
        left @ right
        if device == "cuda":
            torch.cuda.synchronize()
        if attempt > 1:
            best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def useful_flop(run: Path) -> float:
    """FLOP a token of the matrix products that the run's method needs."""
    import bench
    import yaml
    from transformers import LlamaConfig

    state = json.loads(next((run / "checkpoints").glob("step-*/state.json")).read_text(encoding="utf-8"))
    shape = LlamaConfig(**{k: v for k, v in state["model_config"].items() if k != "model_type"})
    settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    method = "qgalore+" if settings["lowrank"]["embeddings"] == "int8" else "qgalore"
    tokens = settings["train"]["micro_batch_size"] * settings["data"]["sequence_length"]
    found = bench.products(shape, method, settings["lowrank"]["rank"], tokens)
    return sum(2 * m * k * n * count for (m, k, n), count in found.items()) / tokens


def row_of(run: Path, limit: float) -> tuple[str, ...]:
    """Cells of the table for a finished run."""
    plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [row for row in rows if row.get("loss") is not None]
    late = steps[len(steps) // 2 :]
    speed = statistics.median(row["tokens_per_second"] for row in late)
    memory = [max(row.get(key, 0) for row in steps) for key in ("memory_bytes", "reserved_bytes")]
    planned = sum(sum(plan[part].values()) for part in ("resident", "transient", "outside"))
    return (
        *(f"{size / GIB:.2f}" for size in (planned, *memory)),
        f"{steps[0]['step_seconds']:.1f}",
        f"{speed:,.0f}",
        f"{statistics.median(row['step_seconds'] for row in late) * 1e3:,.0f}",
        f"{speed * useful_flop(run) / limit:.0%}",
        f"{steps[0]['loss']:.3f} → {steps[-1]['loss']:.3f}",
    )


def table(rows: dict[str, tuple[str, ...]]) -> str:
    head = ("case", "plan", "allocated", "reserved", "first", "tokens/s", "ms", "useful", "loss")
    lines = [head, *((name, *cells) for name, cells in rows.items())]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def examine(cpu: bool) -> int:
    """``qgalore doctor`` here; its exit code."""
    command = [sys.executable, str(ROOT / "tools" / "doctor.py"), "--configs", "llama7b_16gb.yaml"]
    return subprocess.run([*command, *(["--cpu"] if cpu else [])], check=False).returncode


def prove(out: Path, name: str, command: list[str], limit: float, seconds: float) -> tuple[str, ...] | None:
    """The row of a case, trained in ``seconds`` at most unless it is there already; None if it failed."""
    kept = out / f"{name}.json"
    if kept.is_file():
        print(f"{name}: done before", flush=True)
        return tuple(json.loads(kept.read_text(encoding="utf-8")))
    shutil.rmtree(out / name, ignore_errors=True)  # of a try that ended early
    try:
        code = subprocess.run(command, check=False, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        print(f"error: {name} took more than the {seconds:.0f} s that were left", file=sys.stderr)
        return None
    if code:
        print(f"error: {name} ended with {code}", file=sys.stderr)
        return None
    row = row_of(out / name, limit)
    kept.write_text(json.dumps(row), encoding="utf-8")
    shutil.rmtree(out / name / "checkpoints")
    return row


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="a folder for the runs, new or of a try before")
    parser.add_argument("--only", nargs="+", choices=tuple(CASES), default=list(USUAL))
    parser.add_argument("--config", help="one configuration of yours instead of the cases")
    parser.add_argument("--steps", type=kinds.whole(1), default=8)
    parser.add_argument("--minutes", type=kinds.real(0.0, 1e6), default=10.0, help="after which nothing goes on")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--cpu", action="store_true", help="small shapes on the CPU: whether this script works")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for all cases")
    options = parser.parse_args(arguments)
    ends = time.monotonic() + options.minutes * 60
    device = "cpu" if options.cpu else options.device
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if options.config is None and (code := examine(options.cpu)):
        print(f"error: qgalore doctor ended with {code}; nothing was trained", file=sys.stderr)
        return 1
    cases = {"own": (options.config,)} if options.config else {name: CASES[name] for name in options.only}
    limit = matmul_limit(device, 8192 if device == "cuda" else 512)
    print(f"bf16 products reach {limit / 1e12:.3g} TFLOP/s here", flush=True)
    rows = {}
    for name, (config, *changes) in cases.items():
        if (left := ends - time.monotonic()) <= 0:
            print(f"{name}: no time left; run the same command again", file=sys.stderr)
            continue
        given = settings(out, name, options.steps, device)
        if device == "cpu":
            given = [item for item in given if not item.startswith(("kernels=", "memory.budget="))]
            changes = [item for item in changes if item != "model.attention=flex"]  # which has no backward pass there
        small = SMALL if options.cpu else ()
        command = [sys.executable, str(ROOT / "train.py"), "--config", config, *given, *changes, *small]
        command += options.overrides
        if (row := prove(out, name, command, limit, left)) is not None:
            rows[name] = row
    print(f"\n{table(rows)}")
    return 0 if len(rows) == len(cases) else 1


if __name__ == "__main__":
    sys.exit(door.leave(lambda: main(sys.argv[1:])))
