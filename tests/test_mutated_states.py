"""Hundreds of changed checkpoints and records: each is refused with a message, or read as what it says; none ends in a
traceback, now or in the step after. What only a bit flip or a cut can have done is never accepted."""

import json
import math
import random
import shutil

import pytest
import torch
from helpers import FILES, mutate, reseal, save_checkpoint, trained
from safetensors.torch import load_file, save_file

from qgalore.errors import ConfigError, NumericalError
from qgalore.files import checkpoint
from qgalore.training import resume
from qgalore.training.records import Records

CASES = 300
POSITION = {"step": 2, "sample": [0, 4], "tokens": 9, "losses": [2.0, 1.5], "skip": [], "best_loss": 1.0, "order": 0}
TEXT = {"config": {"run": {}, "train": {"lr": 0.1}}, "position": POSITION, "data": "d", "model_config": {"a": [1]}}
WRONG = (None, "x", -1, 2**70, 1.5, float("nan"), [], {}, [[]], {"a": 1}, True, "1" * 200)
MUST_FAIL = {"drop", "dtype", "shape", "rename", "nan", "inf", "empty"}


def change_a_tensor(folder, rng):
    """Change one tensor of one file; says how."""
    path = folder / rng.choice(FILES)
    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    value = tensors[name]
    kind = rng.choice(["drop", "add", "dtype", "shape", "rename", "nan", "inf", "value", "empty"])
    if kind in ("nan", "inf") and not value.is_floating_point():
        kind = "value"
    if kind == "drop":
        del tensors[name]
    elif kind == "add":
        tensors[rng.choice(["extra", f"{name}x", "a|b", "a|inner|b", "a|other|b"])] = torch.zeros(3)
    elif kind == "dtype":
        tensors[name] = value.to(torch.float64 if value.dtype != torch.float64 else torch.int32)
    elif kind == "shape":
        tensors[name] = torch.cat([value.reshape(-1), value.reshape(-1)])
    elif kind == "rename":
        del tensors[name]
        tensors[name[:-1]] = value
    elif kind == "empty":
        tensors[name] = value.reshape(-1)[:0]
    else:
        number = {"nan": math.nan, "inf": -math.inf, "value": 3}[kind]
        value.view(-1)[rng.randrange(value.numel())] = number
    save_file(tensors, path)
    return kind, f"{path.name}: {name}"


def change_the_state(state, rng):
    """Change, drop or add one field somewhere in the document; says which."""
    node, trail = state, []
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = rng.choice(keys)
        trail.append(key)
        below = node[key]
        if not (isinstance(below, (dict, list)) and below) or rng.random() < 0.2:
            break
        node = below
    how = rng.choice(["replace", "replace", "replace", "drop", "add"])
    if how == "drop":
        del node[key]
    elif how == "add" and isinstance(node, dict):
        node["more"] = rng.choice(WRONG)
    else:
        node[key] = rng.choice(WRONG)
    return "state", f"{how} {'.'.join(map(str, trail))}"


def use(folder, model, opt):
    """What resuming does with a checkpoint, and a step and a save after it."""
    state = checkpoint.read_state(folder)
    position = resume._position(folder, state)
    checkpoint.load_into(folder, state, model, opt)
    tokens = torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(0))
    model(tokens, use_cache=False).logits.float().logsumexp(-1).mean().backward()
    opt.step()
    opt.refresh_counts(), opt.waiting()
    json.dumps({"position": vars(position)})
    save_checkpoint(folder.parent / "after" / folder.name, model, opt.state_dict(), {"position": vars(position)})


@pytest.fixture
def good(tiny_llama, tmp_path):
    model, opt = trained(tiny_llama, num_hidden_layers=1)
    return model, opt, save_checkpoint(tmp_path / "good" / "step-00000002", model, opt.state_dict(), TEXT)


@pytest.mark.slow
def test_resealed_checkpoints(good, tmp_path):
    model, opt, source = good
    rng, refused, accepted = random.Random(1), 0, 0
    for case in range(CASES):
        bad = tmp_path / "bad" / source.name
        shutil.copytree(source, bad)
        state = json.loads((bad / "state.json").read_text())
        change = rng.random() < 0.5
        kind, what = change_a_tensor(bad, rng) if change else change_the_state(state, rng)
        reseal(bad, state)
        try:
            use(bad, model, opt)
        except ConfigError as error:
            refused += str(bad) in str(error)  # the message names the checkpoint
        except NumericalError:  # a huge scale, finite itself
            accepted += 1
        except Exception as error:
            raise AssertionError(f"case {case}: {kind} {what}") from error
        else:
            accepted += 1
            assert kind not in MUST_FAIL, f"case {case}: {kind} {what} was accepted"
        opt.skip()
        shutil.rmtree(tmp_path / "bad")
        shutil.rmtree(tmp_path / "after", ignore_errors=True)
    use(source, model, opt)  # the original is still taken, by the very model that met all others
    print(f"{CASES} resealed checkpoints: {refused} refused, {accepted} read as what they say")
    assert refused + accepted == CASES
    assert refused > CASES // 3


@pytest.mark.slow
def test_raw_checkpoints(good, tmp_path):
    """No changed byte is accepted, whatever it is in."""
    model, opt, source = good
    rng = random.Random(2)
    for case in range(CASES):
        bad = tmp_path / "bad" / source.name
        shutil.copytree(source, bad)
        how = mutate(bad, rng)
        with pytest.raises(ConfigError):
            raise AssertionError(f"case {case}: {how} was accepted: {use(bad, model, opt)}")
        shutil.rmtree(tmp_path / "bad")
    print(f"{CASES} raw checkpoints: all refused")


ROW = {"step": 1, "loss": 2.0, "lr": 0.1, "grad_norm": 1.0}


@pytest.mark.slow
def test_records(tmp_path):
    """Whole rows up to the step stay, byte for byte; all other bytes are in the side file."""
    rng, aside_files = random.Random(3), 0
    for case in range(CASES):
        path = tmp_path / f"{case}.jsonl"
        rows = [json.dumps({**ROW, "step": step}).encode() for step in range(1, 9)]
        rows.insert(4, json.dumps({"step": 4, "eval_loss": 1.0}).encode())
        raw = b"\n".join(rows) + b"\n"
        for _ in range(rng.randrange(1, 4)):
            place = rng.randrange(len(raw))
            cut = rng.choice([0, 1, rng.randrange(60)])
            new = rng.choice(
                [b"", rng.randbytes(3), b"\n", b"null\n", b"\0" * 9, b'"', b"{", b"[" * 50_000, b"9" * 5000]
            )
            raw = raw[:place] + new + raw[place + cut :]
        path.write_bytes(raw)
        records = Records(path)
        records.cut_back(6)
        records.append_evaluation({"step": 6, "eval_loss": 1.0})
        records.append_evaluation({"step": 6, "eval_loss": 1.0})
        kept = path.read_bytes().splitlines()
        found = [json.loads(line) for line in kept]
        assert all(0 <= row["step"] <= 6 for row in found)
        evaluated = [row["step"] for row in found if "eval_loss" in row]
        assert len(evaluated) == len(set(evaluated))
        before = raw.split(b"\n")
        assert all(line in before for line in kept[:-1])
        side = tmp_path / f"{case}.jsonl.set-aside"
        aside_files += side.exists()
        others = side.read_bytes().split(b"\n") if side.exists() else []
        lost = [line for line in before if line.strip() and line not in kept and line not in others]
        assert all(json.loads(line)["step"] > 6 or "eval_loss" in json.loads(line) for line in lost), f"case {case}"
    print(f"{CASES} records files: all read, lines set aside in {aside_files}")
