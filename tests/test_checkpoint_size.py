"""Saving a model of a billion weights: memory, and rates beside torch.save and safetensors on the same tensors.

python -m pytest -m slow -s tests/test_checkpoint_size.py
"""

import re
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import save_checkpoint
from safetensors.torch import save_file

import qgalore
from qgalore.files import checkpoint
from qgalore.models import loading

PROC = Path("/proc/self")


def memory(field: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (peak) of this process, in bytes."""
    return int(re.search(rf"{field}:\s+(\d+)", (PROC / "status").read_text()).group(1)) * 1024


def measured(work) -> tuple[float, int]:
    """Seconds that ``work`` takes, and how far the resident set rose above where it began."""
    (PROC / "clear_refs").write_text("5")  # the peak starts again from here
    before, started = memory("VmRSS"), time.perf_counter()
    work()
    return time.perf_counter() - started, memory("VmHWM") - before


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_saving_a_billion_weights_makes_no_second_copy(tmp_path):
    config = loading.model_config("llama_1b", tokenizer_size=32000, overrides={}, report=lambda line: None)
    model = loading.from_scratch(config, dtype=torch.bfloat16, seed=0)
    qgalore.convert(model, rank=512)
    opt = qgalore.optimizer(model, lr=1e-3)
    for slot in opt.tensors:
        for part in slot.parts:
            part.step(torch.zeros_like(part.leaf), 1e-3)  # states as after a step
    folder, figures = tmp_path / "step-00000001", {}
    saved = measured(lambda: save_checkpoint(folder, model, opt.state_dict(), {"position": {}}))
    size = sum(file.stat().st_size for file in folder.iterdir())
    figures["save (fsync, SHA-256)"] = saved
    figures["verify"] = measured(lambda: checkpoint.read_state(folder))
    state = checkpoint.read_state(folder)
    figures["load"] = measured(lambda: checkpoint.load_into(folder, state, model, opt))
    tensors, _ = checkpoint.flatten(opt.state_dict())
    tensors = {n: v.contiguous() for n, v in {**checkpoint._unshared(model.state_dict()), **tensors}.items()}
    figures["torch.save"] = measured(lambda: torch.save(tensors, tmp_path / "x.pt"))
    (tmp_path / "x.pt").unlink()
    figures["safetensors.save_file"] = measured(lambda: save_file(tensors, tmp_path / "x.safetensors"))
    print(f"\n{size / 1e9:.2f} GB")
    for name, (seconds, rise) in figures.items():
        print(f"{name:<24}{size / 1e6 / seconds:>8.0f} MB/s  peak memory +{rise / 1e6:.0f} MB")
    assert size > 2e9
    assert saved[1] < 300e6
