import json

import pytest

from qgalore.convergence import records
from qgalore.errors import ConfigError


def test_a_real_run_is_read_whole(recorded):
    folder, _ = recorded
    run = records.read_run(folder)
    assert [row["step"] for row in run.train] == list(range(1, 15))
    assert [row["step"] for row in run.evaluations] == [0, 7, 14]
    lines = (folder / "subspace.jsonl").read_text().splitlines()
    assert run.refreshes == [json.loads(line) for line in lines]
    assert (run.name, run.step, run.max_steps, run.finished, run.unreadable) == ("tiny", 14, 14, True, 0)


def test_a_run_in_progress_and_a_damaged_line(recorded):
    folder, _ = recorded
    lines = (folder / "metrics.jsonl").read_text().splitlines()[1:]  # without the evaluation before the first step
    half = [*lines[:3], lines[3][:20], "[1, 2]", *lines[4:6], lines[6][:9]]
    (folder / "metrics.jsonl").write_text("\n".join(half))
    run = records.read_run(folder)
    assert [row["step"] for row in run.train] == [1, 2, 3, 5, 6]
    assert run.unreadable == 1  # the one in the middle; the last is being written
    assert not run.finished


def test_missing_files_are_empty(recorded):
    folder, _ = recorded
    (folder / "subspace.jsonl").unlink()
    (folder / "config.yaml").unlink()
    run = records.read_run(folder)
    assert run.refreshes == []
    assert run.max_steps is None
    assert run.setting("lowrank", "max_gap") is None
    assert not run.finished
    (folder / "config.yaml").write_text("lowrank: [not: a, section")
    assert records.read_run(folder).config == {}


def test_what_is_not_a_run_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name, message in (("gone", "does not exist"), ("file", "is a file"), ("empty", "is not a run's folder")):
        with pytest.raises(ConfigError, match=f"{name} {message}.*runs/quickstart"):
            records.read_run(tmp_path / name)
    (tmp_path / "empty" / "metrics.jsonl").write_text("")
    run = records.read_run(tmp_path / "empty")
    with pytest.raises(ConfigError, match=r"metrics.jsonl holds no train row.*--follow"):
        records.require_rows(run)


def test_runs_of_one_name_are_told_apart(recorded, tmp_path):
    folder, _ = recorded
    other = tmp_path / "elsewhere" / "tiny"
    other.mkdir(parents=True)
    (other / "config.yaml").write_text("")
    found = records.distinct([records.read_run(folder), records.read_run(other)])
    assert [run.name for run in found] == [str(folder), str(other)]


@pytest.mark.parametrize(
    ("value", "wanted"), [(1.5, 1.5), (2, 2), (True, None), ("3", None), (float("nan"), None), (None, None)]
)
def test_numbers_are_finite_numbers(value, wanted):
    assert records.number({"x": value}, "x") == wanted
    assert records.numbers({"x": [0.5, value]}, "x") == (None if wanted is None else [0.5, wanted])
    assert records.number({}, "x") is None
