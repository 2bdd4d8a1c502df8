"""What several test files share: short training loops, states and their comparison, damaged files and seals."""

import hashlib
import json
import os
import random
import resource
import signal
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import qgalore
from qgalore.data.tokenizer import train_tokenizer
from qgalore.files import checkpoint
from qgalore.parallel import ALONE
from qgalore.parallel.stages import complete
from qgalore.training.run_lock import RunLock

FILES = ("model.safetensors", "optimizer.safetensors")  # of a checkpoint
QUICK = {"rank": 8, "basis_format": "int4"}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def rows(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def final_state(run, step=6):
    folder = Path(run) / "checkpoints" / f"step-{step:08d}"
    return {**load_file(folder / "model.safetensors"), **load_file(folder / "optimizer.safetensors")}


def stored_model(place, kinds, kind, finish=lambda model: model):
    """The folder below ``place`` of a fresh model of the config ``kinds[kind]``, with a tokenizer of 270 entries. It is
    made when it is first asked for; ``finish`` may give the model other values before."""
    folder = Path(place) / kind
    if not folder.exists():
        torch.manual_seed(1)
        finish(AutoModelForCausalLM.from_config(kinds[kind])).save_pretrained(folder)
        train_tokenizer(["the sea"] * 3, vocab_size=270, report=lambda line: None).save_pretrained(folder)
    return folder


def loss_of(model, tokens):
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def train(model, opt, batches, micro=1):
    for tokens in batches:
        for part in tokens.chunk(micro):
            (loss_of(model, part) / micro).backward()
        opt.step()
        opt.zero_grad()
    return model


def stored(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def distance(model, other, start):
    """How far two models are apart, relative to how far training has moved them."""
    pairs = [
        (a.detach().double(), b.detach().double(), c.detach().double())
        for a, b, c in zip(model, other, start, strict=True)
    ]
    gap = sum(float((a - b).square().sum()) for a, b, _ in pairs) ** 0.5
    return gap / sum(float((b - c).square().sum()) for _, b, c in pairs) ** 0.5


def assert_header_is(plan, path):
    """Every line of a printed ``plan`` stands in the header of the configuration ``path``."""
    printed = [line.split() for line in plan.splitlines() if line.startswith("  ")]
    header = [line[1:].split() for line in path.read_text().splitlines() if line.startswith("#")]
    assert len(printed) > 8
    assert [line for line in printed if line not in header] == []


def save_checkpoint(folder, model, optimizer_state, run_state, team=ALONE):
    """Write a checkpoint now, as a run does; returns ``folder``."""
    draft = checkpoint.begin(folder, model, optimizer_state, run_state, team)
    if draft is not None:
        complete(checkpoint.END, draft.stages(), team)
    return folder


def prune_checkpoints(newest, keep_last, keep_every=None, keep_steps=(), team=ALONE):
    """Delete old checkpoints now, as a run does after it has saved ``newest``."""
    complete("the old checkpoints", checkpoint.pruning(newest, keep_last, keep_every, lambda: keep_steps, team), team)


@contextmanager
def no_file_larger_than(size):
    """The operating system lets no file grow past ``size`` bytes, as a full disk would not.

    Only around what is tested: pytest's own output may be a file too.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def another_process_holds(folder):
    ready, tell = os.pipe()
    child = os.fork()
    if not child:
        lock = RunLock(folder)
        os.write(tell, b"1" if lock.works else b"0")
        signal.pause()
    assert os.read(ready, 1) == b"1"
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def trained(tiny_llama, dtype=torch.float32, steps=2, embeddings="full", **changes):
    model = tiny_llama(**changes).to(dtype)
    qgalore.convert(model, rank=8, embeddings=embeddings)
    opt = qgalore.optimizer(model, lr=5e-3, update_proj_gap=2)
    tokens = torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(0))
    for _ in range(steps):
        model(tokens, use_cache=False).logits.float().logsumexp(-1).mean().backward()
        opt.step()
    return model, opt


def mutate(folder, rng: random.Random) -> str:
    """Damage one file in one of many ways; says how."""
    path = folder / rng.choice(["model.safetensors", "optimizer.safetensors", "state.json", "state.json"])
    raw = path.read_bytes()
    kind = rng.choice(["flip", "flip", "truncate", "empty", "delete", "swap", "insert", "zeros", "field"])
    if kind == "flip":
        position = rng.choice([rng.randrange(len(raw)), rng.randrange(min(64, len(raw)))])
        path.write_bytes(raw[:position] + bytes([raw[position] ^ 1 << rng.randrange(8)]) + raw[position + 1 :])
    elif kind == "truncate":
        path.write_bytes(raw[: rng.randrange(len(raw))])
    elif kind == "insert":
        position = rng.randrange(len(raw))
        path.write_bytes(raw[:position] + rng.randbytes(rng.randrange(1, 9)) + raw[position:])
    elif kind == "zeros":
        start = rng.randrange(len(raw) - 1)
        path.write_bytes(raw[:start] + bytes(len(raw) - start))
    elif kind == "delete":
        path.unlink()
    elif kind == "swap":
        other = folder / ("model.safetensors" if path.name != "model.safetensors" else "optimizer.safetensors")
        path.write_bytes(other.read_bytes())
    elif kind == "field":
        path = folder / "state.json"
        state = json.loads(path.read_text())
        key = rng.choice(list(state))
        state[key] = rng.choice([None, 0, "x", [], {}, -1, 99])
        path.write_text(rng.choice([json.dumps(state), json.dumps(state[key]), json.dumps([state])]))
    else:
        path.write_bytes(b"")
    return f"{kind} {path.name}"


def reseal(folder, state):
    """Let the seals say what the files now hold, unless the seals are what was changed."""
    for name in FILES:
        content = (folder / name).read_bytes()
        if isinstance(state.get("files"), dict) and isinstance(state["files"].get(name), dict):
            state["files"][name] |= {
                "bytes": len(content),
                "pieces": [[len(content), hashlib.sha256(content).hexdigest()]],
            }
    state.pop("sha256", None)
    (folder / "state.json").write_text(json.dumps({**state, "sha256": checkpoint.seal_of(state)}))
