"""The tool that times the steps of two runs in pairs, on a small real run."""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import bench_steps


def test_two_orders_are_timed_in_pairs_and_see_the_same_losses(tiny_run, capfd):
    ways = ["--one", "train.order=batch_major train.stepping=deferred", "--other", "train.order=layer_major"]
    assert bench_steps.main(["--config", "tiny.yaml", "--pairs", "3", *ways]) == 0
    out = capfd.readouterr().out
    assert "losses the same in every bit" in out
    assert "s a step with train.order=batch_major train.stepping=deferred" in out
    middle, low, high = map(float, re.search(r"ratio (\S+) \((\S+) to (\S+) in 3 pairs\)", out).groups())
    assert 0 < low <= middle <= high


def test_runs_that_see_other_losses_are_said_to(tiny_run, capfd):
    assert bench_steps.main(["--config", "tiny.yaml", "--pairs", "1", "--other", "run.seed=5"]) == 0
    assert "losses not the same" in capfd.readouterr().out


def test_the_ratio_is_the_other_run_to_the_first():
    assert bench_steps.ratio_line([1.0, 2.0, 1.0], [2.0, 2.0, 1.5]) == "ratio 1.500 (1.000 to 2.000 in 3 pairs)"
