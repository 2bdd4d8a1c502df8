"""Building and loading a billion weights takes little more memory than the int8 model that results."""

import subprocess
import sys

import pytest

LIMIT = 1 << 30  # what the project promises; measured a tenth of it

BUILD = """
import sys, torch
from pathlib import Path
from qgalore.models import loading, streaming
from qgalore.models.convert import convert

def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

folder = Path(sys.argv[1])
if sys.argv[2] == "fresh":
    shape = loading.model_config("llama_1b", tokenizer_size=32000, overrides={}, report=print)
    model = loading.skeleton(shape, dtype=torch.bfloat16)
    source = loading.fresh_source(model, seed=0, report=print)
else:
    model = loading.pretrained_skeleton(folder, dtype=torch.bfloat16)
    source = loading.stored_source(folder, model, report=print)
convert(model, rank=512)
before = memory("VmRSS")
streaming.allocate(model, torch.device("cpu"))
streaming.fill(model, source, "model")
kept = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())}
print("RESULT", memory("VmHWM") - before, sum(kept.values()))
"""

SAVE = """
import sys, torch
from qgalore.models import loading
shape = loading.model_config("llama_1b", tokenizer_size=32000, overrides={}, report=print)
model = loading.from_scratch(shape, dtype=torch.bfloat16, seed=0)
model.save_pretrained(sys.argv[1], max_shard_size="500MB")
"""


def run(script: str, *arguments: str) -> str:
    finished = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("origin", ["fresh", "folder"])
def test_a_billion_weights_stream_to_int8(origin, tmp_path):
    if origin == "folder":
        run(SAVE, str(tmp_path))
        assert len(list(tmp_path.glob("*.safetensors"))) >= 5
    line = next(line for line in run(BUILD, str(tmp_path), origin).splitlines() if line.startswith("RESULT"))
    peak, model = (int(value) for value in line.split()[1:])
    print(f"\n{origin}: peak {peak / 1e6:.0f} MB above the start, the model itself {model / 1e6:.0f} MB")
    assert peak - model < LIMIT
    assert peak > model / 2
