"""The script for several GPUs: in its smallest form over gloo, and what it says of runs that go wrong."""

import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest

from qgalore import config
from qgalore.errors import ConfigError

TOOLS = Path(__file__).resolve().parent.parent.parent / "tools"


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    spec = importlib.util.spec_from_file_location("prove_cards", TOOLS / "prove_cards.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "prove_cards", module)  # its dataclasses ask for it
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_two_processes_beside_one(tool, tmp_path, capfd):
    out = tmp_path / "out"
    arguments = ["--out", str(out), "--device", "cpu", "--only", "one", "shard", "mesh"]
    assert tool.main(arguments) == 0, capfd.readouterr()
    rows = json.loads((out / "cards.json").read_text())
    one, two = rows["one"], rows["shard"]
    assert [rows[name]["status"] for name in ("one", "shard", "mesh")] == ["passed", "passed", "left out"]
    assert two["sent"] == pytest.approx(two["planned_sent"], rel=0.01)
    assert one["sent"] == one["planned_sent"] == 0
    assert two["planned"] < one["planned"]
    assert max(two["differs"]) < two["allowed"]["later"]
    assert two["seconds_a_step"] > 0
    assert not list(out.glob("*/run/checkpoints"))
    assert "shard" in (out / "cards.txt").read_text()
    capfd.readouterr()
    assert tool.main(arguments) == 0
    assert "shard: done before" in capfd.readouterr().out


def place_of(tool, out, device="cpu", processes=4):
    return tool.Place(out, device, processes, time.monotonic() + 60)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_case_is_a_configuration(tool, tmp_path, device):
    place = place_of(tool, tmp_path, device)
    for name, case in tool.CASES.items():
        made = tool.large_settings(place, name, case) if case.kind == "large" else place.settings(name, case, 4)
        loaded = config.load(tool.LLAMA if case.kind == "large" else tool.QUICK, tool.jobs.given(made))
        assert loaded.train.grad_accumulation == 16
        assert loaded.lowrank.rule == case.rule
        assert str(loaded.parallel) == ("{replicate: 2, shard: 2}" if case.how == "mesh" else case.how)
        assert (loaded.lowrank.rank == 1024) == (case.kind == "large")
    assert tool.parallel("mesh", 8) == "{replicate: 4, shard: 2}"


def test_cases_that_need_other_cards_are_left_out(tool, tmp_path):
    for processes, fits in ((2, False), (4, True), (5, False), (6, True)):
        why = tool.left_out(place_of(tool, tmp_path, processes=processes), tool.CASES["mesh"])
        assert (why is None) == fits
    assert "needs GPUs" in tool.left_out(place_of(tool, tmp_path), tool.CASES["7b-shard"])


def run_of(folder, losses, norms=None):
    """A run's folder with records of these losses."""
    folder.mkdir(parents=True)
    rows = [
        {"step": n, "lr": 1, "loss": loss, "grad_norm": norm}
        for n, (loss, norm) in enumerate(zip(losses, norms or [1.0] * len(losses), strict=True), start=1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_losses_beyond_the_order_of_sums_are_faults(tool, tmp_path):
    """Sixteen micro-batches: 2 · 16 · 2⁻²⁴ in the first step, a hundred times that later."""
    tool.tables.write(tmp_path, {"machine": {}, "one": {"status": "passed", "losses": [4.0, 3.0], "norms": [1.0, 1.0]}})
    limits = (2 * 16 * 2.0**-24, 200 * 16 * 2.0**-24)
    for step, times, fault in ((0, 0.9, False), (0, 1.1, True), (1, 0.9, False), (1, 1.1, True)):
        losses = [4.0, 3.0]
        losses[step] *= 1 + times * limits[step]
        run = run_of(tmp_path / f"{step}-{times}", losses)
        found = tool.held_to_one(place_of(tool, tmp_path), run, tool.CASES["shard"])
        assert found["faults"] == ([f"loss of step {step + 1}"] if fault else [])
    run = run_of(tmp_path / "mean", [4.0, 3.0], [1.0, 0.25])  # AdamW's losses do not tell a mean from a sum
    assert tool.held_to_one(place_of(tool, tmp_path), run, tool.CASES["shard"])["faults"] == ["norm of step 2"]
    run = run_of(tmp_path / "nan", [4.0, float("nan")])
    assert tool.held_to_one(place_of(tool, tmp_path), run, tool.CASES["shard"])["faults"] == ["loss of step 2"]


def test_what_ran_is_kept_when_a_case_fails_or_time_is_over(tool, tmp_path, monkeypatch, capfd):
    def passed(place, name, case):
        (place.out / name / "run" / "checkpoints").mkdir(parents=True)
        return {"losses": [1.0], "norms": [1.0]}

    def late(place, name, case):
        assert place.left <= case.seconds
        raise tool.jobs.LateError("took too long")

    def refused(place, name, case):
        (place.out / name).mkdir()
        words = "error: x.yaml: 1 problem\n  parallel: no mesh\n\nexitcode  : 2 (pid: 7)\n"
        (place.out / name / "run.log").write_text(words)
        raise tool.jobs.JobError("ended with 1")

    def failed(place, name, case):
        raise tool.jobs.JobError("ended with 1")

    kinds = {"alone": passed, "beside": refused, "killed": late, "resharded": failed}
    monkeypatch.setattr(tool, "RUN", kinds)
    names = ["one", "shard", "killed", "resharded"]
    arguments = ["--out", str(tmp_path), "--device", "cpu", "--only", *names]
    assert tool.main(arguments) == 1
    rows = json.loads((tmp_path / "cards.json").read_text())
    assert [rows[name]["status"] for name in names] == ["passed", "refused", "out of time", "failed"]
    assert rows["shard"]["note"] == "x.yaml: 1 problem parallel: no mesh"
    assert not (tmp_path / "one/run/checkpoints").exists()
    assert "did not pass: killed, resharded" in capfd.readouterr().err
    assert "took too long" in (tmp_path / "cards.txt").read_text()
    # what has a verdict is not tried again, and nothing begins when time is over
    kinds["alone"] = kinds["beside"] = failed
    assert tool.main([*arguments, "--minutes", "0"]) == 1
    rows = json.loads((tmp_path / "cards.json").read_text())
    assert [rows[name]["status"] for name in names] == ["passed", "refused", "not reached", "not reached"]


def test_results_of_other_cards_are_not_mixed(tool, tmp_path, capfd):
    tool.tables.write(tmp_path, {"machine": {"processes": 8, "device": "cuda"}})
    with pytest.raises(ConfigError, match=r"is of .*'processes': 8"):
        tool.main(["--out", str(tmp_path), "--device", "cpu", "--only", "one"])


def test_bytes_of_a_plan_are_read_from_its_line(tool):
    line = "host: 1\nwire:      1,277.5 KiB sent by each of 2 processes in a step, counted\n"
    assert tool.tables.planned_wire(line) == 1277.5 * 1024
    assert tool.tables.planned_wire("no such line") == 0
