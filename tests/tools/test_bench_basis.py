"""The tool that compares bases, on gradients of a small real run."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import bench_basis


def test_the_randomized_basis_keeps_the_exact_ones_energy(tiny_run, capfd):
    """98 % is the target: what two power iterations miss is nearly as weak as what the exact basis drops."""
    wide = ["model.overrides={hidden_size: 128, intermediate_size: 320, num_hidden_layers: 3}"]
    assert bench_basis.main(["--config", "tiny.yaml", "--rank", "24", "--steps", "3", "--ago", "2", *wide]) == 0
    rows = [line.split() for line in capfd.readouterr().out.splitlines()]
    rows = [row for row in rows if row[:1] in (["first"], ["middle"], ["last"])]
    assert [row[:2] for row in rows] == [[depth, "320×128"] for depth in bench_basis.DEPTHS]
    for row in rows:
        energy, exact, _, _, cold_share, _, _, warm_share = map(float, row[2:])
        assert 0 < energy <= 1
        assert exact > 0
        assert 0.98 <= cold_share <= 1 + 1e-5  # fp32 sums of energies
        assert 0.98 <= warm_share <= 1 + 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--layer", "nothing"], "ends no low-rank layer"), (["data.train=nowhere.jsonl"], "nowhere.jsonl")],
)
def test_what_cannot_be_compared_is_refused(tiny_run, capfd, arguments, message):
    assert bench_basis.main(["--config", "tiny.yaml", *arguments]) == 2
    assert message in capfd.readouterr().err


def test_a_gradient_from_before_the_run_is_refused():
    with pytest.raises(SystemExit):
        bench_basis.main(["--steps", "2", "--ago", "3"])
