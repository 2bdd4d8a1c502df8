"""The tool that compares a mask with a call for each document, on a small real run."""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import bench_attention


def test_steps_are_timed_in_pairs(tiny_run, capfd):
    """Pieces of 40 characters are some 20 tokens, of which a row of 32 holds parts of about two."""
    arguments = ["--config", "tiny.yaml", "--pairs", "3", "--characters", "40"]
    assert bench_attention.main(arguments) == 0
    out = capfd.readouterr().out
    held = float(re.search(r"^(\d+\.\d) documents in a row;", out, re.MULTILINE)[1])
    assert 1.5 < held < 6
    middle, low, high = map(float, re.search(r"ratio (\S+) \((\S+) to (\S+) in 3 pairs\)", out).groups())
    assert 0 < low <= middle <= high


def test_a_model_that_needs_a_mask_is_refused(tiny_run, capfd):
    assert bench_attention.main(["--config", "tiny.yaml", "data.document_attention=joined"]) == 2
    assert "does not attend document by document" in capfd.readouterr().err
