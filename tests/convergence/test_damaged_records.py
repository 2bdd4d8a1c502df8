"""Records that someone else sent, or that a disk damaged: shown as far as they go, never with a traceback."""

import json
import random

import pytest

from qgalore.convergence import csv_rows, records, report, summary, table, tensorboard

TITLE = "\x1b]0;title\x07"
ODD = (None, True, TITLE, [TITLE], {TITLE: 1}, -1, 0, 1e308, 10**400, [], [1, "a"], {}, "9" * 400, 0.5, [[]], "a.1.b")
CONFIGS = ("a: &a [*a]", "[" * 500, "train: 1", "lowrank: []", "\x1b", f"method: {TITLE!r}")


def shown(folder) -> str:
    run = records.read_run(folder)
    one = summary.summarise(run)
    text = table.run_table(one, table.layer_lines(one)) + table.run_table(one, table.layer_lines(one, kinds=True))
    return text + table.runs_table([one]) + report.page([one]) + csv_rows.refresh_rows([run])


@pytest.mark.parametrize("mutations", [60, pytest.param(200, marks=pytest.mark.slow)])
def test_mutated_records_are_shown_without_escape_codes(recorded, mutations):
    folder, _ = recorded
    chance = random.Random(3)
    names = ("metrics.jsonl", "subspace.jsonl", "config.yaml")
    sound = {name: (folder / name).read_text() for name in names}
    for _ in range(mutations):
        for name in names:
            (folder / name).write_text(sound[name])
        name = chance.choice(names[:2])
        lines = sound[name].splitlines()
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(lines))
            row = json.loads(sound[name].splitlines()[at])
            row[chance.choice([*row])] = chance.choice(ODD)
            lines[at] = chance.choice([json.dumps(row), json.dumps(row), lines[at][:20], "null", "[]", "[" * 3000])
        (folder / name).write_text("\n".join(lines) + "\n")
        if chance.random() < 0.2:
            (folder / "config.yaml").write_text(chance.choice(CONFIGS))
        text = shown(folder)
        assert "\x1b" not in text
        assert "\x07" not in text


def test_two_runs_of_one_name_stay_apart_inside_the_folder_asked_for(recorded, tmp_path):
    folder, _ = recorded
    other = tmp_path / "others" / folder.name
    other.mkdir(parents=True)
    for name in ("metrics.jsonl", "config.yaml"):
        (other / name).write_text((folder / name).read_text())
    runs = records.distinct([records.read_run(one) for one in (folder.absolute(), other.absolute(), folder)])
    assert len(runs) == 2  # the same folder twice is one run
    names = [tensorboard.inside(run.name) for run in runs]
    assert len(set(names)) == 2
    for name in [*names, tensorboard.inside("/etc"), tensorboard.inside(".."), tensorboard.inside("../../x")]:
        assert (tmp_path / name).resolve().parent == tmp_path.resolve()
