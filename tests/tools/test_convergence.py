import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "convergence.py"


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location("convergence_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_one_run_with_every_output(recorded, tool, tmp_path, capfd):
    folder, _ = recorded
    assert tool.main([str(folder), "--html", str(tmp_path / "a.html"), "--csv", str(tmp_path / "a.csv")]) == 0
    out = capfd.readouterr().out
    assert "tiny: step 14 of 14 | loss " in out
    assert "  layers.1" in out
    assert (tmp_path / "a.html").read_text().endswith("</html>\n")
    rows = (folder / "subspace.jsonl").read_text().splitlines()
    assert len((tmp_path / "a.csv").read_text().splitlines()) == len(rows) + 1
    assert sorted(path.name for path in tmp_path.glob("*a.*")) == ["a.csv", "a.html"]  # no half-written file is left


def test_several_runs_end_in_one_table(recorded, tool, tmp_path, capfd):
    folder, _ = recorded
    other = tmp_path / "runs" / "other"
    other.mkdir()
    (other / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5, "lr": 0.1, "tokens": 5, "tokens_per_second": 10}\n')
    assert tool.main([str(folder), str(other), "--kinds", "--html", str(tmp_path / "b.html")]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-2:]] == ["tiny", "other"]
    assert lines[-1].split() == ["other", "1/-", "2.5000", "-", "10", "-", "-", "-", "-"]
    assert not any(line.startswith("  layers.") for line in lines)


def test_errors_are_one_line_and_code_2(recorded, tool, tmp_path, capfd, monkeypatch):
    folder, _ = recorded
    (tmp_path / "empty").mkdir()
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "metrics.jsonl").write_text("")
    for package in ("torch.utils.tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, package, None)
    for arguments, message in (
        (["nowhere"], "nowhere does not exist"),
        (["tiny.yaml"], "is a file"),
        (["empty"], "is not a run's folder"),
        (["young"], "holds no train row"),
        ([str(folder), "nowhere"], "nowhere does not exist"),
        ([str(folder), "--html", "no/such/folder/a.html"], "cannot be written"),
        ([str(folder), "--tensorboard", "board"], "pip install tensorboard"),
        ([str(folder), "--wandb", "project"], "pip install wandb"),
    ):
        assert tool.main(arguments) == 2
        err = capfd.readouterr().err
        assert err.startswith("error: ")
        assert message in err
        assert len(err.splitlines()) == 1


def test_follow_goes_on_until_the_run_ends(recorded, tool, tmp_path, capfd, monkeypatch):
    """The run's files as they grow: nothing, a half-written row, the end."""
    folder, _ = recorded
    metrics = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").unlink()
    contents = [metrics[:500], metrics]
    pages = []

    def later(seconds):
        pages.append((tmp_path / "f.html").read_text())
        (folder / "metrics.jsonl").write_text(contents.pop(0))

    monkeypatch.setattr(time, "sleep", later)
    assert tool.main([str(folder), "--follow", "--html", str(tmp_path / "f.html")]) == 0
    assert contents == []
    states = [line.split(" |")[0] for line in capfd.readouterr().out.splitlines() if line.startswith("tiny: ")]
    done = sum('"loss"' in line for line in metrics[:500].splitlines()[:-1])
    assert states == [
        "tiny: step 0 of 14, not finished", f"tiny: step {done} of 14, not finished", "tiny: step 14 of 14"
    ]  # fmt: skip
    assert all('http-equiv="refresh"' in page for page in pages)
    assert 'http-equiv="refresh"' not in (tmp_path / "f.html").read_text()


def test_ctrl_c_ends_following(recorded, tool, monkeypatch):
    folder, _ = recorded
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][:4]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupt)
    assert tool.main([str(folder), "--follow"]) == 0
