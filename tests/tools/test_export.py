import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

TOOL = Path(__file__).resolve().parents[2] / "tools" / "export.py"


@pytest.fixture
def export():
    spec = importlib.util.spec_from_file_location("export_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_a_checkpoint_exports_what_the_run_exported(tiny_run, export):
    """The same files, byte for byte, and a line that says for which readers."""
    code, out, err = tiny_run("train.max_steps=2", "export.formats=[hf, int8, gguf]")
    assert code == 0, err
    assert "runs/tiny/export/int8, for vLLM, and transformers with the package compressed-tensors" in out
    for fmt in ("hf", "int8", "gguf"):
        source = "runs/tiny" if fmt == "int8" else "runs/tiny/checkpoints/step-00000002"  # a run: its newest
        assert export([source, "--format", fmt, "--out", f"out/{fmt}"]) == 0
        files = sorted(path.name for path in Path(f"runs/tiny/export/{fmt}").iterdir())
        assert files == sorted(path.name for path in Path(f"out/{fmt}").iterdir())
        for name in files:
            one, other = (Path(f"{place}/{fmt}/{name}").read_bytes() for place in ("runs/tiny/export", "out"))
            assert one == other, name
    for fmt in ("hf", "int8"):
        first, again = load_file(f"runs/tiny/export/{fmt}/model.safetensors"), load_file(f"out/{fmt}/model.safetensors")
        assert first.keys() == again.keys()
        assert all(torch.equal(value, again[name]) for name, value in first.items())
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        both = [
            AutoModelForCausalLM.from_pretrained(f"out/{f}", dtype=torch.bfloat16)(tokens).logits
            for f in ("hf", "int8")
        ]
    assert torch.equal(*both)  # the int8 export dequantizes to the bf16 one


def test_bad_arguments_are_named(tiny_run, export, capfd):
    assert tiny_run("train.max_steps=1", "method=adamw")[0] == 0
    path = "runs/tiny/checkpoints/step-00000001"
    for arguments, message in [
        (["nowhere", "--format", "hf", "--out", "x"], "nowhere does not exist"),
        (["tiny.yaml", "--format", "hf", "--out", "x"], "tiny.yaml is a file"),
        (["cache", "--format", "hf", "--out", "x"], "not a complete checkpoint"),
        ([path, "--format", "int8", "--out", "x"], "not int8"),
        ([path, "--format", "hf", "--out", "runs"], "not an empty folder"),
    ]:
        assert export(arguments) == 2
        assert message in capfd.readouterr().err
