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
        assert loaded.memory.budget is not None


@pytest.mark.slow
def test_a_failed_run_is_reported(tiny_run, tool, tmp_path, capfd):
    assert tool.main(["--config", "nowhere.yaml", "--device", "cpu", "--out", str(tmp_path / "out")]) == 1
    assert "own ended with 2" in capfd.readouterr().err
