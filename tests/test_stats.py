import json

import pytest
import torch

from qgalore.errors import ConfigError
from qgalore.training.records import ProgressLine, Records, human_time, memory_bytes


def test_records_append_and_cut_back(tmp_path):
    records = Records(tmp_path / "rows.jsonl")
    records.cut_back(3)
    records.append([{"step": step, "loss": 1.5} for step in range(1, 6)])
    with records.path.open("a") as file:
        file.write('{"step": 6, "lo')  # what a kill leaves
    records.cut_back(3)
    assert [json.loads(line)["step"] for line in records.path.read_text().splitlines()] == [1, 2, 3]
    records.append([])
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "rows.jsonl.set-aside"}
    assert (tmp_path / "rows.jsonl.set-aside").read_text() == '{"step": 6, "lo\n'


NO_ROWS = [b"null", b"3", b"[]", b"{}", b'{"step": "4"}', b'{"step": true}', b'{"step": 1.0}', b'{"step": -1}',
           b"\xff\xfe", b'{"step": NaN}', b"\0\0\0", b"[" * 100_000, b'{"step": ' + b"9" * 5000 + b"}",
           b'"step"']  # fmt: skip


def test_what_is_no_row_is_set_aside_and_rows_keep_their_bytes(tmp_path, capsys):
    rows = [b'{"step":1,   "loss": 2}', b'{"step": 2, "loss": NaN}', b'{"loss": "\xc3\xa9", "step": 3}']
    records = Records(tmp_path / "rows.jsonl")
    lines = [rows[0], *NO_ROWS[:7], rows[1], b"", *NO_ROWS[7:], rows[2]]
    records.path.write_bytes(b"\n".join(lines))
    records.cut_back(2)
    assert records.path.read_bytes() == rows[0] + b"\n" + rows[1] + b"\n"
    assert (tmp_path / "rows.jsonl.set-aside").read_bytes().split(b"\n") == [*NO_ROWS, b""]
    assert f"note: {len(NO_ROWS)} lines of {records.path} (the first is line 2)" in capsys.readouterr().out
    before = records.path.stat().st_mtime_ns
    records.cut_back(2)
    assert records.path.stat().st_mtime_ns == before


def test_one_row_for_an_evaluation(tmp_path):
    path = tmp_path / "rows.jsonl"
    first, other = {"step": 2, "eval_loss": 1.5}, {"step": 2, "loss": 3.0}
    Records(path).append([other])
    for _ in range(2):
        Records(path).append_evaluation(first)
    Records(path).append_evaluation({"step": 2, "eval_loss": float("inf")})
    assert path.read_text() == '{"step": 2, "loss": 3.0}\n{"step": 2, "eval_loss": null}\n'
    records = Records(path)
    records.append([first, first])  # as earlier versions did
    records.cut_back(2)
    records.append_evaluation({"step": 3, "eval_loss": 1.0})
    records.cut_back(2)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [other, first]


def test_a_path_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"gone.*--resume auto"):
        Records(tmp_path / "gone" / "rows.jsonl").append([{"step": 1}])


def test_memory_grows_with_what_is_allocated(device):
    before = memory_bytes(device)
    kept = torch.ones(1 << 26, device=device)
    assert memory_bytes(device) - before > 0.5 * kept.nbytes


@pytest.mark.parametrize(("seconds", "text"), [(5, "5s"), (75, "1m15s"), (7260, "2h01m")])
def test_human_time(seconds, text):
    assert human_time(seconds) == text


def test_progress_shows_the_first_and_last_step_and_few_between(capsys):
    progress = ProgressLine(100, interval=60.0)
    row = {"loss": 2.0, "lr": 0.01, "grad_norm": 1.0, "tokens_per_second": 9e3, "memory_bytes": 2**30}
    for step in range(1, 101):  # every fourth step spends half its time in a refresh: an eighth of all time
        row |= {"step_seconds": 2.0, "refresh_seconds": 0.0 if step % 4 else 1.0}
        progress.show({**row, "step": step}, (7, 3))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("step 1/100 | loss 2.0000 | lr 1.00e-02 | grad norm 1 | 9,000 tok/s | 1.00 GiB")
    assert "refreshes 7 (skipped 3), 12.5% of the time | ETA 0s" in lines[1]
