"""Exports of a checkpoint read its file tensor by tensor: the bytes are those of a model in memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from helpers import assert_same, save_checkpoint
from transformers import AutoConfig

import qgalore
from qgalore import config as configuration
from qgalore.errors import ConfigError
from qgalore.files import checkpoint, mapping
from qgalore.lowrank.layers import lora
from qgalore.models import loading, streaming
from qgalore.models.convert import convert
from qgalore.training import export as exports
from qgalore.training.model import convert_as

SHAPE = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": None}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 33}
TIED = ["model.overrides.tie_word_embeddings=true"]
CASES = {
    "tied and int8": ("llama", [*TIED, "lowrank.embeddings=int8"], ["hf", "int8", "gguf"]),
    "tied": ("llama", TIED, ["hf", "int8", "gguf"]),
    "experts": ("qwen3_moe", [], ["hf"]),
    "transposed": ("gpt2", [], ["hf"]),
    "lora": ("llama", ["method=lora", "lowrank.rank=8", "lowrank.scale=null"], ["hf"]),
    "all trained": ("llama", ["method=adamw"], ["hf", "gguf"]),
}


def files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.mark.parametrize("case", CASES)
def test_the_bytes_are_those_of_a_model_in_memory(case, tiny_run, tmp_path):
    kind, options, formats = CASES[case]
    if kind != "llama":
        torch.manual_seed(1)
        shape = AutoConfig.for_model(kind, **SHAPE, **HEADS, **(MOE if kind == "qwen3_moe" else {}))
        (tmp_path / "shape").mkdir()
        (tmp_path / "shape/config.json").write_text(json.dumps({**shape.to_dict(), "model_type": kind}))
        options = [*options, "model.config=shape/config.json", "model.overrides={}"]
    short = ["train.max_steps=2", "train.save_every=2", "export.formats=[]", "sample.max_new_tokens=0"]
    code, _, err = tiny_run(*options, *short)
    assert code == 0, err
    source = Path("runs/tiny/checkpoints/step-00000002")
    before = files(source)
    (held, tokenizer), (mapped, _) = exports.restore_model(source), exports.restore_model(source, mapped=True)
    assert_same(held.state_dict(), mapped.state_dict())
    for fmt in formats:
        exports.EXPORTS[fmt].save(held, tokenizer, tmp_path / f"held-{fmt}")
        for again in (1, 2):  # which finds the model as it was
            exports.EXPORTS[fmt].save(mapped, tokenizer, tmp_path / f"mapped-{fmt}-{again}")
            assert files(tmp_path / f"held-{fmt}") == files(tmp_path / f"mapped-{fmt}-{again}"), fmt
    assert files(source) == before


def test_lora_merged_into_fp32_weights_leaves_them_as_they_are(tiny_llama):
    model = tiny_llama()
    convert(model, rank=None, weight_format="none")
    lora.attach(model, rank=4, alpha=8.0, dtype=torch.float32, seed=0)
    layer = model.model.layers[0].self_attn.q_proj
    before = layer.weight.clone()
    with torch.no_grad():
        layer.lora_b.fill_(0.5)
    merged = layer.dense_weight()
    assert torch.equal(layer.weight, before)
    torch.testing.assert_close(merged, before + 2 * 0.5 * layer.lora_a.detach().sum(0))


@pytest.mark.parametrize("fault", ["a tensor less", "another dtype", "another shape", "a tensor more", "not finite"])
def test_what_is_wrong_is_said_as_of_a_loaded_model(fault, tiny_llama, tmp_path):
    from safetensors.torch import load_file, save_file

    model = tiny_llama()
    qgalore.convert(model, rank=8)
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    name = "model.norm.weight"
    if fault == "a tensor less":
        del tensors[name]
    elif fault == "another dtype":
        tensors[name] = tensors[name].bfloat16()
    elif fault == "another shape":
        tensors[name] = tensors[name][:-1].clone()
    elif fault == "a tensor more":
        tensors["surplus"] = tensors[name].clone()
    else:
        tensors[name][-1] = torch.inf
    save_file(tensors, tmp_path / "model.safetensors")
    assert load_file(tmp_path / "model.safetensors")
    told = []
    for fill in (checkpoint.load_model, checkpoint.map_model):
        with pytest.raises(ConfigError, match="cannot be used") as caught:
            fill(tmp_path, model)
        told.append(str(caught.value))
    assert told[0] == told[1]


def test_a_file_may_be_larger_than_memory(tmp_path):
    """A sparse file of a tebibyte; the tensor behind it lies across its own alignment."""
    size = (1 << 40) + 1
    header = {"big": {"dtype": "I8", "shape": [size], "data_offsets": [0, size]}}
    header["odd"] = {"dtype": "F32", "shape": [3], "data_offsets": [size, size + 12]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.seek(8 + len(text) + size)
        file.write(torch.tensor([1.0, 2.0, 3.0]).numpy().tobytes())
    found = dict(mapping._views(path))
    assert found["odd"].tolist() == [1.0, 2.0, 3.0]
    assert (found["odd"].data_ptr() % 4, found["big"].shape, int(found["big"][-1])) == (0, (size,), 0)


DEEP = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 24}

MEASURE = """
import sys, threading, time
from pathlib import Path
from qgalore.training import assemble, export

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

peak, over = 0, threading.Event()
def watch():
    global peak
    while not over.wait(0.002):
        peak = max(peak, anonymous())

source, held = Path(sys.argv[1]), sys.argv[2] == "held"
assemble.export_checkpoint(source, "hf", Path(sys.argv[3]) / "warm")  # what the libraries take for themselves
if held:
    restore = export.restore_model
    export.restore_model = lambda source, mapped: restore(source)
before = anonymous()
threading.Thread(target=watch, daemon=True).start()
for fmt in ("hf", "int8", "gguf"):
    assemble.export_checkpoint(source, fmt, Path(sys.argv[3]) / fmt)
over.set()
print("RESULT", peak - before)
"""


def grown(source, how, target):
    """By how many bytes a process's anonymous memory grows while it exports a checkpoint in all formats."""
    command = [sys.executable, "-c", MEASURE, str(source.resolve()), how, str(target.resolve())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(next(line for line in done.stdout.splitlines() if line.startswith("RESULT")).split()[1])


def deepened(source, shape):
    """A checkpoint in the run of ``source``, of a model of the same kind in ``shape`` whose weights are all zero."""
    state = checkpoint.read_state(source)
    config = configuration.parse(state["config"], "the run")
    noted = {**state["model_config"], **shape, "layer_types": None}
    model = loading.skeleton_with_buffers(loading.noted_config(noted, "the run"), dtype=torch.float32)
    convert_as(config, model)
    streaming.allocate(model, torch.device("cpu"))
    with torch.no_grad():
        for value in model.state_dict().values():
            value.zero_()
    run_state = {key: value for key, value in state.items() if key not in ("version", "optimizer", "files", "sha256")}
    empty = {"step_count": 1, "groups": [], "slots": {}}
    return save_checkpoint(source.with_name("step-00000009"), model, empty, {**run_state, "model_config": noted})


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_holds_few_tensors_at_a_time(tiny_run, tmp_path):
    code, _, err = tiny_run("train.max_steps=1", "export.formats=[]", "sample.max_new_tokens=0")
    assert code == 0, err
    source = deepened(Path("runs/tiny/checkpoints/step-00000001"), DEEP)
    stored, largest = (source / "model.safetensors").stat().st_size, 4 * DEEP["hidden_size"] * DEEP["intermediate_size"]
    growth = grown(source, "mapped", tmp_path)
    print(f"\n{growth / 1e6:.1f} MB for a model of {stored / 1e6:.1f} MB, whose largest matrix has {largest / 1e6:.1f}")
    assert growth < 5 * largest < stored / 3
