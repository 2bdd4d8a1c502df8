"""The tool that measures how a step's cost grows."""

import math
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import bench_scaling


def test_the_exponent_of_a_power_law_is_found():
    exponent, error = bench_scaling.fit([(x, 3.0 * x**1.7) for x in (1.0, 2.0, 8.0, 16.0)])
    assert exponent == pytest.approx(1.7, rel=1e-12)
    assert error < 1e-7
    # by hand: logs (0, 0), (1, 2), (2, 2) have slope 1, residues −1/3, 2/3, −1/3, and error √((2/3)/1/2)
    points = [(math.exp(a), math.exp(b)) for a, b in ((0, 0), (1, 2), (2, 2))]
    assert bench_scaling.fit(points) == pytest.approx((1.0, math.sqrt(1 / 3)), rel=1e-12)
    assert bench_scaling.fit(points[:2])[1] == math.inf


@pytest.mark.slow
def test_every_quantity_is_measured_and_drawn(tmp_path, capsys):
    small = ["--width", "32", "--depth", "1", "--rank", "4", "--sequence", "8", "--tokens", "32", "--vocabulary", "64"]
    page = tmp_path / "scaling.html"
    assert bench_scaling.main([*small, "--doublings", "2", "--rounds", "1", "--html", str(page)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if " exponent " in line]
    assert [(row[0], row[1]) for row in rows] == [
        (method, quantity) for method in ("adamw", "qgalore") for quantity in bench_scaling.QUANTITIES
    ]
    for row in rows:
        assert [int(cell[:-1]) for cell in row[5::2]] == [int(row[5][:-1]) << i for i in range(3)]
        assert all(float(cell) > 0 for cell in row[6::2])
    text = page.read_text(encoding="utf-8")
    assert text.count("<polyline") == 8
    assert "http://" not in text
    assert "https://" not in text
    ElementTree.fromstring(text.split("\n", 1)[1])  # well-formed


def test_sequences_that_do_not_fit_the_tokens_are_refused():
    with pytest.raises(SystemExit):
        bench_scaling.main(["--tokens", "1000"])
