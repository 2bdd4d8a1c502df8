"""Seeded damage to a Hugging Face folder: each is refused in our words, or read exactly as transformers reads it."""

import json
import random
import shutil
import signal
import struct
import warnings
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers import logging as transformers_logging

from qgalore.errors import ConfigError
from qgalore.models import loading
from qgalore.models.loss import uncalled_layers

COUNT, SECONDS = 300, 20
ODD = (0, -1, 1, 3, 7, 10**6, 10**30, 0.5, 1e30, float("nan"), float("inf"), None, True, "x", "", [], [1], {}, {"a": 1})


def flipped(path, rng, first=0, last=None) -> None:
    content = bytearray(path.read_bytes())
    place = rng.randrange(first, min(last or len(content), len(content)))
    content[place] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def shard(folder, rng):
    return rng.choice(sorted(folder.glob("model-*.safetensors")))


def with_header(path, edit) -> None:
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def header_byte(folder, rng):
    path = shard(folder, rng)
    flipped(path, rng, 0, 8 + struct.unpack("<Q", path.read_bytes()[:8])[0])


def header_field(folder, rng):
    def edit(header):
        name = rng.choice([name for name in header if name != "__metadata__"])
        kind = rng.randrange(6)
        if kind == 0:
            header[name]["data_offsets"][rng.randrange(2)] = rng.choice([*ODD, 8, 64])
        elif kind == 1:
            header[name]["shape"] = rng.choice([[], [1], header[name]["shape"][::-1], [-1, 4], [2**40, 2**40], "x"])
        elif kind == 2:
            header[name]["dtype"] = rng.choice(["F64", "F16", "BF16", "I32", "F8_E4M3", "BOOL", None, 3])
        elif kind == 3:
            header.pop(name)
        elif kind == 4:
            header[name + "x"] = header.pop(name)
        else:
            other = rng.choice([name for name in header if name != "__metadata__"])
            header[name], header[other] = header[other], header[name]

    with_header(shard(folder, rng), edit)


def truncated(folder, rng):
    path = rng.choice([shard(folder, rng), folder / "config.json", folder / "model.safetensors.index.json"])
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])


def extended(folder, rng):
    path = shard(folder, rng)
    path.write_bytes(path.read_bytes() + bytes(rng.randrange(1, 64)))


def swapped(folder, rng):
    one, other = rng.sample(sorted(folder.glob("model-*.safetensors")), 2)
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    if rng.random() < 0.5:
        other.write_bytes(first)


def replaced(folder, rng):
    path = shard(folder, rng)
    path.unlink()
    kind = rng.randrange(4)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        path.write_bytes(b"")
    elif kind == 2:
        path.symlink_to(path.name)


def index_lies(folder, rng):
    path = folder / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    names = content["weight_map"]
    name, kind = rng.choice(sorted(names)), rng.randrange(6)
    if kind == 0:
        names.pop(name)
    elif kind == 1:
        names[name] = rng.choice([*ODD, "../config.json", "config.json", "/dev/zero", "none.safetensors"])
    elif kind == 2:
        gone = shard(folder, rng).name
        content["weight_map"] = {n: file for n, file in names.items() if file != gone}
    elif kind == 3:
        content["weight_map"] = rng.choice(ODD)
    elif kind == 4:
        target = shard(folder, rng).name
        content["weight_map"] = dict.fromkeys(names, target)
    else:
        names["no.such.tensor"] = shard(folder, rng).name
    path.write_text(json.dumps(content))


def json_byte(folder, rng):
    names = ("config.json", "generation_config.json", "model.safetensors.index.json")
    flipped(folder / rng.choice(names), rng)


def config_field(folder, rng):
    path = folder / "config.json"
    content = json.loads(path.read_text())
    name = rng.choice(sorted(content))
    if rng.random() < 0.15:
        content.pop(name)
    else:
        content[name] = rng.choice(ODD)
    path.write_text(json.dumps(content))


def added_file(folder, rng):
    kind, source = rng.randrange(4), shard(folder, rng)
    if kind == 0:
        save_file({n: v + 1 for n, v in load_file(source).items()}, folder / "model.safetensors", {"format": "pt"})
    elif kind == 1:
        save_file({n: v + 1 for n, v in load_file(source).items()}, folder / "model-extra.safetensors")
    elif kind == 2:
        (folder / "adapter_config.json").write_text(rng.choice(["{}", "[]", "{", '{"base_model_name_or_path": 3}']))
    else:
        added = load_file(source)
        name = rng.choice(sorted(added))
        save_file(added | {name.removeprefix("model."): added[name] + 1}, source, {"format": "pt"})


def data_value(folder, rng):
    path = shard(folder, rng)
    tensors = load_file(path)
    values = tensors[rng.choice(sorted(tensors))].view(-1)
    values[rng.randrange(len(values))] = rng.choice([float("nan"), float("inf"), float("-inf"), 0.0])
    save_file(tensors, path, {"format": "pt"})


KINDS = (
    header_byte, header_field, truncated, extended, swapped, replaced, index_lies, json_byte, config_field, added_file,
    data_value,
)  # fmt: skip


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    torch.manual_seed(1)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=64, num_key_value_heads=2, max_position_embeddings=64, **shape)
    folder = tmp_path_factory.mktemp("original")
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def looked_at(folder) -> str:
    """``refused`` or ``read``; fails for what is read otherwise than transformers reads it."""
    try:
        model = loading.pretrained(str(folder), dtype=torch.float32, report=lambda line: None)
        uncalled_layers(model, nn.Linear)
    except ConfigError:
        return "refused"
    theirs, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False, use_safetensors=True
    )
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    mine, wanted = model.state_dict(), theirs.state_dict()
    assert set(mine) == set(wanted)
    for name, value in mine.items():
        assert torch.equal(value, wanted[name]), name
        assert torch.isfinite(value).all(), name
    return "read"


@pytest.mark.slow
def test_damaged_folders_are_refused_or_read_as_transformers_reads_them(original, tmp_path):
    transformers_logging.set_verbosity_error()

    def late(*_):
        pytest.fail(f"one folder took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    counts: Counter[tuple[str, str]] = Counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for seed in range(COUNT):
                rng, folder = random.Random(seed), tmp_path / "m"
                shutil.copytree(original, folder)
                kind = KINDS[seed % len(KINDS)]
                kind(folder, rng)
                signal.alarm(SECONDS)
                try:
                    counts[kind.__name__, looked_at(folder)] += 1
                except Exception as error:
                    raise AssertionError(f"seed {seed}, {kind.__name__}: {type(error).__name__}: {error}") from error
                signal.alarm(0)
                shutil.rmtree(folder)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    for (kind, outcome), count in sorted(counts.items()):
        print(f"{kind:<14} {outcome:<8} {count}")
    assert counts.total() == COUNT
    for kind in ("header_byte", "header_field", "truncated", "extended", "replaced"):
        assert counts[kind, "refused"] > counts[kind, "read"]
