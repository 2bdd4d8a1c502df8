"""Train a large configuration for a few true steps on the CPU and hold what happened against its plan:

    python tools/prove_memory.py --out DIR                           # LLaMA 7B, two steps: 25 GB of disk
    python tools/prove_memory.py --out DIR --layers 2 --steps 2      # the same path with two layers

The text is the quickstart's. Prints the planned and the measured peak resident set, the losses, and how many tensors
of every kind changed between the checkpoint of the beginning and the last one; exits with 1 if one did not.
"""

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from qgalore.cli import arguments as kinds
from qgalore.cli import door

ROOT = Path(__file__).resolve().parent.parent


def settings(options: argparse.Namespace) -> list[str]:
    text = ROOT / "configs" / "quickstart_data"
    changes = {
        "device": "cpu",
        "run.dir": options.out,
        "run.name": "proof",
        "data.train": text / "train.jsonl.gz",
        "data.valid": text / "valid.jsonl.gz",
        "data.tokenizer": "null",
        "data.vocab_size": 4096,
        "data.cache_dir": options.out / "cache",
        "data.sequence_length": options.sequence_length,
        "train.max_steps": options.steps,
        "train.epochs": "null",
        "train.warmup_steps": 0,
        "train.warmup_ratio": "null",
        "train.activation_checkpointing": "true",
        "train.eval_every": options.steps,
        "train.eval_batches": 1,
        "train.save_every": "null",
        "train.keep_last": 2,
        "export.formats": "[]",
        "sample.max_new_tokens": 0,
    }
    given = [f"{key}={value}" for key, value in changes.items()]
    if options.layers:
        given.append(f"model.overrides.num_hidden_layers={options.layers}")
    return [*given, *options.overrides]


def peak_of(command: list[str], log: Path) -> tuple[int, int]:
    """The exit code and the peak resident set, in bytes, of a command whose output goes to ``log`` and the terminal."""
    import resource

    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for line in process.stdout:
            print(line, end="", flush=True)
            file.write(line)
        code = process.wait()
    unit = 1 if sys.platform == "darwin" else 1024
    return code, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit


def tensors_of(checkpoint: Path):
    """(name, reader) of every trained tensor of a checkpoint; the fp32 master stands for a rounded vector."""
    from safetensors import safe_open

    model = safe_open(checkpoint / "model.safetensors", "pt")
    masters = safe_open(checkpoint / "optimizer.safetensors", "pt")
    kept = {name.split("|")[0]: name for name in masters.keys() if name.endswith("|extra|master")}  # noqa: SIM118
    for name in model.keys():  # noqa: SIM118 - safe_open is not a mapping
        if name.endswith(("weight", "bias")):
            yield name, masters.get_tensor(kept[name]) if name in kept else model.get_tensor(name)


def changes(before: Path, after: Path) -> tuple[Counter, list[str]]:
    """How many trained tensors of each kind changed between two checkpoints, and the names of those that did not."""
    kinds, same = Counter(), []
    for (name, old), (_, new) in zip(tensors_of(before), tensors_of(after), strict=True):
        moved = bool((old != new).any())
        kinds[name.split(".")[-2]] += moved
        same += [] if moved else [name]
    return kinds, same


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Train a large configuration for a few steps on the CPU.")
    parser.add_argument("--config", default="llama7b_16gb.yaml", metavar="NAME|PATH")
    parser.add_argument("--out", required=True, type=Path, help="a folder for the run; it must not hold one yet")
    parser.add_argument("--layers", type=kinds.whole(1), help="fewer layers than the configuration has")
    parser.add_argument("--steps", type=kinds.whole(1), default=2)
    parser.add_argument("--sequence-length", type=kinds.whole(1), default=128)
    parser.add_argument("--limit-gib", type=kinds.real(0, 1e6), help="fail above this peak resident set")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(arguments)
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    command = [sys.executable, str(ROOT / "train.py"), "--config", options.config, *settings(options)]
    code, peak = peak_of(command, options.out / "proof.log")
    if code:
        print(f"error: training ended with {code}", file=sys.stderr)
        return 1
    run = options.out / "proof"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    checkpoints = sorted((run / "checkpoints").glob("step-*"))
    moved, same = changes(checkpoints[0], checkpoints[-1])
    refreshes = sum(1 for _ in (run / "subspace.jsonl").open(encoding="utf-8"))
    print(f"\nsteps {len(losses)}, losses {', '.join(f'{loss:.4f}' for loss in losses)}, refreshes {refreshes}")
    print("changed tensors: " + ", ".join(f"{count} {kind}" for kind, count in sorted(moved.items())))
    print(f"unchanged: {', '.join(same) or 'none'}")
    print(f"peak resident set {peak / 2**30:.2f} GiB; {time.monotonic() - started:.0f} s in all")
    fits = options.limit_gib is None or peak <= options.limit_gib * 2**30
    return 0 if fits and not same and all(loss is not None for loss in losses) else 1


if __name__ == "__main__":
    sys.exit(door.leave(lambda: main(sys.argv[1:])))
