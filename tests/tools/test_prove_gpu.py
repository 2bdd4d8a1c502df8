"""The table of large runs on a GPU, here from a small one on the CPU."""

import importlib.util
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parent.parent.parent / "tools" / "prove_gpu.py"


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location("prove_gpu", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_run_beside_its_plan(tiny_run, tool, device, tmp_path, capfd):
    arguments = ["--config", "tiny.yaml", "--device", device.type, "--out", str(tmp_path / "out"), "--steps", "4"]
    assert tool.main([*arguments, "model.overrides.hidden_size=64", "run.seed=3"]) == 0
    head, row = capfd.readouterr().out.splitlines()[-2:]
    cells = dict(zip(head.split(), row.split(), strict=False))
    assert cells["case"] == "own"
    assert float(cells["plan"]) < float(cells["allocated"]) or device.type == "cuda"  # a CPU's is all of Python's
    assert float(cells["tokens/s"].replace(",", "")) > 0
    assert 0 <= int(cells["useful"].rstrip("%")) < 100


def test_every_case_is_a_configuration_that_is_planned(tool):
    from qgalore import config

    for name, (path, *changes) in tool.CASES.items():
        loaded = config.load(path, [*tool.settings(Path("out"), name, 20, "cuda"), *changes])
        assert loaded.memory.budget == "15.5GiB"
        assert loaded.kernels == "triton"
    assert set(tool.USUAL) <= set(tool.CASES)


@pytest.mark.slow
def test_the_script_runs_dry_and_goes_on_where_it_stopped(tool, tmp_path, capfd, monkeypatch):
    """Two cases on small shapes; then one that has no row yet is made, and the others are not trained again."""
    monkeypatch.setattr(tool, "examine", lambda cpu: 0)
    out = tmp_path / "out"
    given = ["--out", str(out), "--cpu", "--steps", "2", "--only"]
    assert tool.main([*given, "7b", "7b-int8"]) == 0
    assert not list(out.glob("*/checkpoints"))
    first = (out / "7b.json").read_bytes()
    (out / "7b-int8.json").unlink()
    capfd.readouterr()
    assert tool.main([*given, "7b", "7b-int8"]) == 0
    printed = capfd.readouterr().out
    assert "7b: done before" in printed
    assert "7b-int8: done before" not in printed
    assert (out / "7b.json").read_bytes() == first
    assert [line.split()[0] for line in printed.splitlines()[-3:]] == ["case", "7b", "7b-int8"]


def test_nothing_is_trained_where_a_kernel_is_wrong_or_time_is_over(tool, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(tool, "prove", lambda *_: pytest.fail("a case was trained"))
    monkeypatch.setattr(tool, "examine", lambda cpu: 1)
    assert tool.main(["--out", str(tmp_path), "--cpu"]) == 1
    assert "nothing was trained" in capfd.readouterr().err
    monkeypatch.setattr(tool, "examine", lambda cpu: 0)
    assert tool.main(["--out", str(tmp_path), "--cpu", "--only", "7b", "--minutes", "0"]) == 1
    assert "7b: no time left" in capfd.readouterr().err


@pytest.mark.slow
def test_a_failed_run_is_reported(tiny_run, tool, tmp_path, capfd):
    assert tool.main(["--config", "nowhere.yaml", "--device", "cpu", "--out", str(tmp_path / "out")]) == 1
    assert "own ended with 2" in capfd.readouterr().err
