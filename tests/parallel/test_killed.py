"""SIGKILL of single processes under torchrun at drawn moments, and what compares the end with an unbroken run's."""

import importlib.util
import json
import random
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

TOOL = Path(__file__).resolve().parent.parent.parent / "tools" / "prove_kills.py"


@pytest.fixture
def tool(monkeypatch):
    spec = importlib.util.spec_from_file_location("prove_kills", TOOL)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "prove_kills", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for the processes in /proc")
def test_a_kill_in_a_save_changes_no_bit(tool, tmp_path, capfd):
    out = tmp_path / "out"
    assert tool.main(["--out", str(out), "--kills", "1", "--at", "save", "--steps", "8", "--seed", "5"]) == 0
    found = json.loads((out / "kills.json").read_text())
    assert found["differences"] == []
    assert [kill["step"] > 0 for kill in found["kills"]] == [True]
    assert "same bits" in capfd.readouterr().out


@pytest.fixture
def two_runs(tmp_path):
    """Two runs with the same last checkpoint, whose state.json names the run."""
    for name in ("one", "two"):
        folder = tmp_path / name / "checkpoints" / "step-00000002"
        folder.mkdir(parents=True)
        save_file({"weight": torch.arange(8.0)}, folder / "model.safetensors")
        save_file({"state1": torch.arange(8, dtype=torch.uint8)}, folder / "optimizer.safetensors")
        state = {"version": 3, "config": {"run": {"dir": name}, "train": {"lr": 1}}, "day": name, "sha256": name}
        (folder / "state.json").write_text(json.dumps({**state, "position": {"step": 2}}))
        rows = [{"step": n, "loss": n / 3, "lr": 1, "grad_norm": n / 7, "step_seconds": len(name) * n} for n in (1, 2)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "one", tmp_path / "two"


def test_runs_of_other_names_days_and_speeds_do_not_differ(tool, two_runs):
    assert tool.differences(*two_runs) == []


def test_a_bit_of_a_moment_differs(tool, two_runs):
    path = two_runs[1] / "checkpoints/step-00000002/optimizer.safetensors"
    moments = load_file(path)["state1"].clone()
    moments[3] ^= 1
    save_file({"state1": moments}, path)
    assert tool.differences(*two_runs) == ["optimizer.safetensors"]


def test_a_position_differs(tool, two_runs):
    path = two_runs[1] / "checkpoints/step-00000002/state.json"
    path.write_text(path.read_text().replace('"step": 2', '"step": 3'))
    assert tool.differences(*two_runs) == ["state.json"]


def test_a_step_that_was_recorded_twice_differs(tool, two_runs):
    path = two_runs[1] / "metrics.jsonl"
    path.write_text(path.read_text() + path.read_text().splitlines()[-1] + "\n")
    assert tool.differences(*two_runs) == ["losses or norms in metrics.jsonl"]


def test_checkpoints_of_other_steps_or_files_differ(tool, two_runs):
    folder = two_runs[1] / "checkpoints"
    (folder / "step-00000002/rest").touch()
    assert "do not hold the same files" in tool.differences(*two_runs)[0]
    (folder / "step-00000002/rest").unlink()
    shutil.copytree(folder / "step-00000002", folder / "step-00000003")
    assert "do not hold the same files" in tool.differences(*two_runs)[0]


JOB = """
import os, subprocess, sys
for rank in "01":
    here = dict(os.environ, RANK=rank, TORCHELASTIC_RESTART_COUNT=sys.argv[1])
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env=here)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
import time; time.sleep(60)
"""


@pytest.fixture
def start(tool, tmp_path):
    """A function (restarts so far) → the context of a job whose two processes sleep, beside a third that is no rank."""

    def make(restarts):
        command = [sys.executable, "-c", JOB, str(restarts)]
        return tool.started(command, tmp_path / "run", tmp_path / "log", 2, 10.0)

    return make


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for the processes in /proc")
def test_only_a_rank_of_the_job_is_killed_and_all_are_gone_afterwards(tool, start):
    with start(0) as job:
        pids = job.life(0)
        assert sorted(pids) == [0, 1]
        assert not job.kill(1, pids[0])  # another rank's by now
        assert job.kill(1, pids[1])
        gone(pids[1])
        assert Path(f"/proc/{pids[0]}/environ").read_bytes()
        assert not job.kill(1, pids[1])
    gone(pids[0])


def gone(pid):
    """Waits until a process has ended, whether somebody has waited for it or not."""
    until = time.monotonic() + 10
    with suppress(OSError):
        while Path(f"/proc/{pid}/environ").read_bytes():
            assert time.monotonic() < until
            time.sleep(0.01)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for the processes in /proc")
def test_a_life_that_nobody_ended_is_a_fault(tool, start):
    with start(1) as job, pytest.raises(tool.JobError, match="nobody had killed"):
        job.life(0)


def test_a_job_that_fails_is_told_with_its_last_words(tool, tmp_path):
    command = [sys.executable, "-c", "import sys; print('the disk is full'); sys.exit(3)"]
    with pytest.raises(tool.JobError, match=r"ended with 3(?s:.*)the disk is full"):
        tool.undisturbed(command, tmp_path / "run", tmp_path / "log", 1, 10.0)


def test_a_run_whose_bits_differ_is_told(tool, two_runs, tmp_path, monkeypatch, capfd):
    """The driver: kills are spent over several runs, and the first that differs ends it."""
    places = []

    def disturbed(job, length, left, rng):
        places.append(left)
        run = job.run.parent
        shutil.copytree(two_runs[len(places) > 1], run / "run", dirs_exist_ok=True)
        return 0, [tool.Kill(run.name, 0, 1, 1, "step", 0.5)]

    def undisturbed(command, run, *others):
        shutil.copytree(two_runs[0], run)
        return tool.Length(1.0, 0.1)

    def torchrun(*arguments):
        return [sys.executable, "-c", ""]

    path = two_runs[1] / "metrics.jsonl"
    path.write_text(path.read_text().replace('"lr": 1', '"lr": 2'))
    for name, value in (("disturbed", disturbed), ("undisturbed", undisturbed), ("torchrun", torchrun)):
        monkeypatch.setattr(tool, name, value)
    assert tool.main(["--out", str(tmp_path / "out"), "--kills", "5"]) == 1
    assert places == [["any", "step", "save", "any", "step"], ["step", "save", "any", "step"]]
    found = json.loads((tmp_path / "out/kills.json").read_text())
    assert found["differences"] == ["losses or norms in metrics.jsonl"]
    assert found["phases"] == {"step": 2}
    with pytest.raises(SystemExit):
        tool.main(["--out", str(tmp_path / "out")])
    assert "is not empty" in capfd.readouterr().err


def test_moments_are_drawn_by_a_seed(tool):
    """Two jobs of one seed wait for the same steps, and as long."""

    class Recorded:
        run, patience = Path("nowhere"), 1.0

        def __init__(self):
            self.waited = []

        def goes_on(self, seconds):
            self.waited.append(seconds)
            return True

        def wait_for(self, what, seconds, pause=0.0):
            return True

    drawn = []
    for seed in (1, 1, 2):
        job, rng = Recorded(), random.Random(seed)
        for where in tool.PLACES:
            tool.aim(job, 0, tool.Length(8.0, 0.5), where, rng)
        drawn.append(job.waited)
    assert drawn[0] == drawn[1] != drawn[2]
    assert [0 <= x <= most for x, most in zip(drawn[0], (8.0, 0.5, 0.01), strict=True)] == [True] * 3
