"""Records of updates in the table, on the page and as scalars."""

import json
import random
import xml.etree.ElementTree as ET

import pytest

from qgalore.convergence import charts, maps, records, report, summary, tensorboard, updates

LAYERS = [f"model.layers.{i}.{kind}" for i in range(2) for kind in ("self_attn.q_proj", "mlp.down_proj")]


def row(step, layer, update=0.002, weight=0.02, cosine=0.9, shape=(8, 16)):
    head = {"version": 1, "step": step, "layer": layer, "shape": list(shape)}
    return {**head, "update_rms": update, "weight_rms": weight, "momentum_cosine": cosine}


@pytest.fixture
def looked(recorded):
    """A run with looks at steps 1 and 51: cosines fall from layer to layer and from look to look."""
    folder, _ = recorded
    rows = [
        row(step, layer, update=0.001 * (n + 1), cosine=0.99 - 0.1 * n - (step > 1) * 0.01)
        for step in (1, 51)
        for n, layer in enumerate(LAYERS)
    ]
    (folder / "updates.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return folder


def test_the_table_has_the_last_look_and_the_lowest_cosine(looked):
    run = records.read_run(looked)
    lines = [line.split() for line in updates.table(run, kinds=False).splitlines()]
    shown = [cells for cells in lines if cells and cells[0] == "layers.0"]
    # A backward pass comes to down_proj first, so here it counts as the later kind, and the table turns them round.
    assert shown[0] == ["layers.0", "8×16", "2", "1.00e-01", "0.880", "0.880"]
    kinds = [line.split() for line in updates.table(run, kinds=True).splitlines()]
    queries = next(cells for cells in kinds if cells and cells[0] == "self_attn.q_proj")
    assert queries[1:] == ["(2)", "8×16", "4", "1.00e-01", "0.880", "0.780"]
    assert not any(cells and cells[0] == "layers.0" for cells in kinds)


def test_lines_fit_on_a_page(looked):
    assert max(map(len, updates.table(records.read_run(looked), kinds=False).splitlines())) <= 100


def test_the_page_draws_the_updates_and_other_runs_have_none(looked):
    one = summary.summarise(records.read_run(looked))
    page = ET.fromstring(report.page([one]).split("\n", 1)[1])
    assert len(list(page.iter("figure"))) == len(report.FIGURES) + len(report.OF_UPDATES)
    (looked / "updates.jsonl").unlink()
    one = summary.summarise(records.read_run(looked))
    page = ET.fromstring(report.page([one]).split("\n", 1)[1])
    assert len(list(page.iter("figure"))) == len(report.FIGURES)
    assert updates.table(one.run, kinds=True) == ""


def test_the_map_of_a_momentum_names_layer_steps_and_error(looked):
    run = records.read_run(looked)
    told = json.loads(ET.fromstring(maps.momentum_error_by_layer(run)).find("script").text)
    rows = dict(told["rows"])
    assert set(rows) == set(LAYERS)
    # The looks are at steps 1 and 51 of a run whose own records end at 14.
    assert [cell[0] for cell in rows[LAYERS[2]]] == [1, 51]
    assert [cell[2] for cell in rows[LAYERS[2]]] == pytest.approx([0.21, 0.22])
    sizes = dict(json.loads(ET.fromstring(maps.update_size_by_layer(run)).find("script").text)["rows"])
    assert [cell[2] for cell in sizes[LAYERS[3]]] == pytest.approx([0.2, 0.2])


def test_every_figure_is_a_scalar(looked):
    found = {(tag, step): value for tag, value, step in tensorboard.scalars(records.read_run(looked))}
    assert found[f"momentum_cosine/{LAYERS[1]}", 51] == pytest.approx(0.88)
    assert found[f"update_rms/{LAYERS[2]}", 1] == pytest.approx(0.003)
    assert found[f"weight_rms/{LAYERS[2]}", 1] == pytest.approx(0.02)


def test_a_momentum_in_fp32_has_no_cosine(looked):
    (looked / "updates.jsonl").write_text(json.dumps(row(1, LAYERS[0], cosine=None)) + "\n")
    run = records.read_run(looked)
    assert updates.table(run, kinds=False).splitlines()[2].split()[-2:] == ["-", "-"]
    assert charts.stored_momentum(run) == ""


def test_damaged_rows_are_shown_as_far_as_they_go(looked):
    chance = random.Random(5)
    odd = (None, True, "x", [1], -1, 0, 1e308, 1e-320, 10**400, {}, [[]])
    sound = (looked / "updates.jsonl").read_text().splitlines()
    for _ in range(60):
        lines = list(sound)
        for _ in range(3):
            at = chance.randrange(len(lines))
            damaged = json.loads(sound[at])
            damaged[chance.choice([*damaged])] = chance.choice(odd)
            lines[at] = chance.choice([json.dumps(damaged), lines[at][:20], "null"])
        (looked / "updates.jsonl").write_text("\n".join(lines) + "\n")
        run = records.read_run(looked)
        updates.table(run, kinds=False)
        text = report.page([summary.summarise(run)])
        assert "nan" not in text
        assert "inf" not in text.replace("info", "")
