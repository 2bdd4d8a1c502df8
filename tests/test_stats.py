import json

import pytest
import torch

from qgalore.errors import ConfigError
from qgalore.stats import ProgressLine, Records, human_time, memory_bytes


def test_records_append_and_cut_back(tmp_path):
    records = Records(tmp_path / "rows.jsonl")
    records.cut_back(3)
    records.append([{"step": step, "loss": 1.5} for step in range(1, 6)])
    with records.path.open("a") as file:
        file.write('{"step": 6, "lo')  # what a kill leaves
    records.cut_back(3)
    assert [json.loads(line)["step"] for line in records.path.read_text().splitlines()] == [1, 2, 3]
    records.append([])
    assert list(tmp_path.iterdir()) == [records.path]


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
