"""The proof with the real 7B, on two of its layers."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parent.parent.parent / "tools" / "prove_memory.py"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident set as Linux counts it")
def test_two_layers_of_the_real_7b_train_on_a_cpu(tmp_path):
    command = [sys.executable, str(TOOL), "--out", str(tmp_path), "--layers", "2", "--limit-gib", "3.6"]
    finished = subprocess.run([*command, "lowrank.rank=256"], capture_output=True, text=True, check=False)
    out = finished.stdout
    assert finished.returncode == 0, out + finished.stderr
    assert "unchanged: none" in out
    assert "2 down_proj, 1 embed_tokens, 2 gate_proj" in out
    assert re.search(r"steps 2, losses \d+\.\d+, \d+\.\d+, refreshes 14", out)
    planned = float(re.search(r"planned peak (\d+\.\d+) GiB", out)[1])
    peak = float(re.search(r"peak resident set (\d+\.\d+) GiB", out)[1])
    print(f"\nplanned {planned:.2f} GiB, resident set {peak:.2f} GiB")
    assert peak < planned + 0.8  # libraries that load late, and what the C allocator keeps back


@pytest.mark.slow
def test_a_failed_run_is_reported(tmp_path):
    command = [sys.executable, str(TOOL), "--out", str(tmp_path), "--layers", "2", "lowrank.rnk=3"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 1
    assert "did you mean lowrank.rank?" in finished.stdout
    assert "training ended with 2" in finished.stderr
