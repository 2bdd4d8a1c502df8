"""A folder of runs as one page: what its table says, where its links lead, and which runs it finds."""

import json
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from urllib.parse import unquote

import pytest

from qgalore.cli import convergence
from qgalore.convergence import index, records, summary
from qgalore.training import run_lock
from qgalore.training.run_lock import RunLock


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write(folder, rows):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def runs(recorded, tmp_path):
    """A folder with a finished run, one that stopped, one that failed, one without a step, and things that are none."""
    tiny, _ = recorded
    place = tmp_path / "all of them"
    for name in ("done", "study/b c", "study/b-c", "fresh"):
        shutil.copytree(tiny, place / name)
    (place / "done/checkpoints/step-00000014").mkdir(parents=True, exist_ok=True)
    (place / "done/checkpoints/step-00000014/config.yaml").write_text("")
    (place / "empty").mkdir()
    (place / "notes.txt").write_text("")
    write(place / "study/b c", metrics(tiny)[:6])  # the first row is the evaluation before step 1
    broken = {"step": 6, "loss": None, "lr": 0.1, "skipped": "the loss is not <finite>"}
    write(place / "study/b-c", [*metrics(tiny)[:6], broken])
    write(place / "fresh", [])
    return place


def table_of(text):
    rows = [[" ".join(cell.itertext()) for cell in row] for row in ET.fromstring(text.split("\n", 1)[1]).iter("tr")]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]


def test_runs_are_found_and_not_looked_into(runs):
    found = [str(path.relative_to(runs)) for path in records.find_runs(runs)]
    assert found == ["done", "fresh", "study/b c", "study/b-c"]
    deep = runs / "1/2/3/4"
    shutil.copytree(runs / "done", deep)
    assert deep not in records.find_runs(runs)


def test_the_table_and_its_links(runs, tmp_path, capfd):
    page = tmp_path / "out" / "index of runs.html"
    assert convergence.main([str(runs), "--html", str(page)]) == 2, "no folder is made for a path that may be mistyped"
    page.parent.mkdir()
    capfd.readouterr()
    assert convergence.main([str(runs), "--html", str(page), "--csv", str(tmp_path / "rows.csv")]) == 0
    printed = capfd.readouterr().out
    assert f"{page} links to 4 pages in {page.parent / 'index of runs_runs'}" in printed
    assert len([line for line in printed.splitlines() if "/14" in line]) == 4, "a line for each run"
    text = page.read_text(encoding="utf-8")
    by_name = {row["run"]: row for row in table_of(text)}
    states = {name: row["state"] for name, row in by_name.items()}
    assert states == {
        "done": "finished",
        "fresh": "no step recorded",
        "b c": "stopped at step 5",
        "b-c": "failed at step 6: the loss is not <finite>",
    }
    rows = metrics(runs / "done")
    held = [(row["eval_loss"], row["step"]) for row in rows if "eval_loss" in row]
    done = by_name["done"]
    assert done["held-out loss"] == f"{held[-1][0]:.4f}"
    assert done["best"] == "{:.4f} at {}".format(*min(held))
    assert (done["method"], done["rule"], done["steps"]) == ("qgalore", "galore", "14 of 14")
    assert float(done["GiB"]) == pytest.approx(max(row.get("memory_bytes", 0) for row in rows) / 2**30, abs=0.006)
    links = [link.get("href") for link in ET.fromstring(text.split("\n", 1)[1]).iter("a")]
    targets = [page.parent / unquote(link) for link in links]
    assert len({*targets}) == 4
    for target in targets:
        assert '<a href="../index%20of%20runs.html">' in target.read_text(encoding="utf-8")
    assert "http" not in text.replace("http-equiv", "")


def test_every_run_is_a_line_that_can_be_switched(runs):
    found = [summary.summarise(records.read_run(folder)) for folder in records.find_runs(runs)]
    page = ET.fromstring(index.page(found, "t", {}).split("\n", 1)[1])
    held, train = page.iter("figure")
    assert [button.find("i").tail.strip() for button in held.iter("button")] == ["done", "b c", "b-c"]
    assert [button.find("i").tail.strip() for button in train.iter("button")] == ["done", "b c", "b-c"]
    told = json.loads(held.find("script").text)
    assert [step for step, _ in told["series"][0]["points"]] == [0, 7, 14]
    assert not list(page.iter("a")), "no links without pages"


def test_the_best_loss_is_of_all_sets_or_of_the_first_with_a_name(recorded):
    folder, _ = recorded
    rows = [row for row in metrics(folder) if "lr" in row]
    sets = [{"step": 0, "eval_loss/a": 3.0}, {"step": 7, "eval_loss/a": 1.0}, {"step": 14, "eval_loss/a": 2.0}]
    write(folder, [*rows, *sets])
    assert index.best(records.read_run(folder)) == (1.0, 7)
    write(folder, [*rows, *({**row, "eval_loss": 5.0 - row["step"]} for row in sets)])
    assert index.best(records.read_run(folder)) == (-9.0, 14)
    write(folder, rows)
    assert index.best(records.read_run(folder)) == (None, None)


def test_a_page_that_is_a_device_gets_the_table_alone(runs, capfd):
    assert convergence.main([str(runs), "--html", "/dev/null"]) == 0
    assert "/dev/null is not a file" in capfd.readouterr().out


def test_a_folder_without_runs_is_refused(tmp_path, capfd):
    assert convergence.main([str(tmp_path)]) == 2
    assert "no folder below it has" in capfd.readouterr().err


HOLD = "import sys, pathlib; from qgalore.training.run_lock import RunLock\nlock = RunLock(pathlib.Path(sys.argv[1]))\n"


def test_a_lock_is_seen_from_outside_and_from_inside(tmp_path):
    assert run_lock.is_held(tmp_path) is False
    lock = RunLock(tmp_path)
    assert run_lock.is_held(tmp_path) is True
    lock.release()
    if sys.platform != "linux":
        assert run_lock.is_held(tmp_path) is None
        return
    assert run_lock.is_held(tmp_path) is False
    (tmp_path / "config.yaml").write_text("")
    code = HOLD + "print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        assert run_lock.is_held(tmp_path) is True
        other.stdin.close()
    assert run_lock.is_held(tmp_path) is False


@pytest.mark.parametrize(
    ("training", "wanted"), [(True, "running"), (False, "stopped at step 4"), (None, "not finished")]
)
def test_what_became_of_an_unfinished_run(recorded, training, wanted):
    folder, _ = recorded
    write(folder, metrics(folder)[:5])
    run = records.read_run(folder)
    assert index.state(run, training) == wanted
