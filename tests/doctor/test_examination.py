"""``qgalore doctor`` on a CPU: what it prints, and that it fails where a kernel is wrong."""

import os
import subprocess
import sys

import pytest
import torch

from qgalore.cli import doctor as door
from qgalore.doctor import kernels, software


@pytest.fixture
def quick(monkeypatch):
    """Without the table of configurations, which has a test of its own."""
    from qgalore.doctor import fitting

    monkeypatch.setattr(fitting, "lines", lambda card, efficiency, names: [f"{card.name} {efficiency} {names}"])


def test_a_cpu_is_examined(quick, capsys):
    assert door.main(["--cpu"]) == 0
    printed = capsys.readouterr().out
    for head in ("software", "kernels, against the reference", "rates", "a small layer, milliseconds", "shipped"):
        assert f"\n{head}" in printed
    assert f"torch           {torch.__version__}" in printed
    assert "no kernel can run here" in printed
    numbers = [line.split()[-2] for line in printed.splitlines() if line.endswith(("GB/s", "TFLOP/s"))]
    assert len(numbers) == 4
    assert all(float(number.replace(",", "")) > 0 for number in numbers)


def test_a_wrong_kernel_ends_in_1_and_is_named(quick, capsys, monkeypatch):
    from qgalore.doctor import report

    monkeypatch.setattr(report.kernels, "examine", lambda device: (["merge    WRONG: differs"], False))
    assert door.main(["--cpu"]) == 1
    assert "WRONG" in capsys.readouterr().out


@pytest.mark.slow
def test_every_kernel_is_examined_in_the_interpreter():
    pytest.importorskip("triton")
    program = (
        "import torch; from qgalore.doctor import kernels; from qgalore.quant import self_check, kernels as module\n"
        "lines, right = kernels.examine(torch.device('cpu'))\n"
        "assert right and len(lines) == len(self_check.CHECKS) + 4, lines\n"
        "write = module.write_back\n"
        "module.write_back = lambda *a, s, **k: write(*a, s=1.01 * s, **k)\n"
        "lines, right = kernels.examine(torch.device('cpu'))\n"
        "assert not right and any('write_back' in line and 'WRONG' in line for line in lines), lines\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_cpu_build_on_a_machine_with_a_card_is_noticed(monkeypatch):
    monkeypatch.setattr(software, "driver", lambda: "580.65, NVIDIA GeForce RTX 4060 Ti")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built for the CPU alone" in software.remarks()[0]
    assert "pytorch.org" in software.remarks()[0]
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert "Bring the driver up to date" in software.remarks()[0]
    monkeypatch.setattr(software, "driver", lambda: None)
    assert software.remarks() == []


@pytest.mark.parametrize(("system", "package"), [("win32", "triton-windows"), ("linux", "pip install triton")])
def test_an_old_card_and_a_missing_triton_are_said(monkeypatch, system, package):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(software, "version", lambda name: None)
    monkeypatch.setattr(software.sys, "platform", system)
    missing, old = software.remarks()
    assert package in missing
    assert "model.dtype=float32" in old


@pytest.mark.slow
def test_what_is_expected_follows_from_the_card():
    """A faster card is faster; the peak is the plan's, which two small models tell to a few per cent."""
    from qgalore import speed
    from qgalore.training import roofline

    peak, pace = roofline.expected("llama7b_16gb.yaml", speed.find("RTX 4060 Ti"), {})
    same, faster = roofline.expected("llama7b_16gb.yaml", speed.find("RTX 5090"), {})
    assert peak == same == pytest.approx(12.4 * 2**30, rel=0.03)
    assert faster > 1.5 * pace > 500


def test_the_table_tells_what_fits(monkeypatch):
    from qgalore import speed
    from qgalore.doctor import fitting

    monkeypatch.setattr(fitting.roofline, "expected", lambda *_: (15.4 * 2**30, 555.5))
    for size, fits in ((15, "no"), (16, "yes")):
        card = speed.Card("none", 44.1, 176, 288, size)
        _, row = fitting.lines(card, {}, ("llama7b_16gb.yaml",))
        assert row.split() == ["llama7b_16gb.yaml", "15.40", "GiB", fits, "556"]


def test_no_kernel_is_wrong_where_none_can_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    lines, right = kernels.examine(torch.device("cpu"))
    assert right
    assert len(lines) == 1
