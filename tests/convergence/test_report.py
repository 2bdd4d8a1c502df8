"""The page is parsed as XML; every coordinate must lie in its plot, and data where the records say."""

import csv
import io
import json
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path

import pytest

from qgalore.convergence import charts, csv_rows, plot, records, report, summary, tensorboard
from qgalore.files.atomic import write_report


def parsed(text: str) -> ET.Element:
    assert text.startswith("<!DOCTYPE html>\n")
    return ET.fromstring(text.split("\n", 1)[1])


def numbers(element: ET.Element, *names: str) -> list[float]:
    return [float(element.get(name)) for name in names]


def places(element: ET.Element) -> list[tuple[float, float]]:
    """Corners of a drawn element."""
    if element.tag == "rect":
        x, y, width, height = numbers(element, "x", "y", "width", "height")
        assert width >= 0
        assert height >= 0
        return [(x, y), (x + width, y + height)]
    if element.tag == "line":
        x1, y1, x2, y2 = numbers(element, "x1", "y1", "x2", "y2")
        return [(x1, y1), (x2, y2)]
    if element.tag in ("polyline", "polygon"):
        return [tuple(map(float, pair.split(","))) for pair in element.get("points").split()]
    return [tuple(numbers(element, *(("cx", "cy") if element.tag == "circle" else ("x", "y"))))]


def check_drawing(svg: ET.Element) -> int:
    """Data inside the frame, everything inside the view box; returns the number of data marks."""
    _, _, width, height = map(float, svg.get("viewBox").split())
    frame = next(part for part in svg if part.get("class") == "frame")
    (left, top), (right, bottom) = places(frame)
    data = 0
    for part in svg:
        drawn = places(part)
        assert all(0 <= x <= width and 0 <= y <= height for x, y in drawn), ET.tostring(part)
        if part.tag in ("polyline", "polygon", "circle") or part.get("fill"):
            data += 1
            # coordinates are written with one decimal
            assert all(left - 0.1 <= x <= right + 0.1 and top - 0.1 <= y <= bottom + 0.1 for x, y in drawn)
            assert part.find("title").text
    labels = [part.text for part in svg if part.tag == "text"]
    assert len(labels) >= 4
    return data


def test_the_page_of_a_real_run(recorded):
    run = records.read_run(recorded[0])
    page = parsed(report.page([summary.summarise(run)]))
    figures = list(page.iter("figure"))
    assert len(figures) == len(charts.ALL)
    for figure in figures:
        assert check_drawing(figure.find("svg")) > 0
        assert list(figure.iter("span")), "a legend"
    assert page.find("head/style").text.count("prefers-color-scheme:dark") == 1
    assert not list(page.iter("meta"))[1:]


def test_it_refers_to_nothing_outside(recorded):
    found = [summary.summarise(records.read_run(recorded[0]))] * 2
    text = report.page(found, reload_seconds=5)
    for sign in ("http://", "https://", "src=", "href=", "url(", "@import", "<script", "<link"):
        assert sign not in text
    assert parsed(text).find("head/meta[@http-equiv]").get("content") == "5"


def test_runs_of_any_length_and_version_are_drawn(recorded):
    folder, _ = recorded
    rows = (folder / "subspace.jsonl").read_text().splitlines()
    metrics = (folder / "metrics.jsonl").read_text().splitlines()
    for kept in (0, 1, 14, len(rows)):
        (folder / "subspace.jsonl").write_text("\n".join(rows[:kept]))
        (folder / "metrics.jsonl").write_text("\n".join(metrics[: max(1, kept // 3)]))
        page = parsed(report.page([summary.summarise(records.read_run(folder))]))
        for svg in page.iter("svg"):
            check_drawing(svg)
    (folder / "subspace.jsonl").write_text("")
    page = parsed(report.page([summary.summarise(records.read_run(folder))]))
    assert "similarity" in next(p.text for p in page.iter("p") if (p.text or "").startswith("Not recorded"))


def test_a_long_run_of_a_large_model_stays_small():
    layers = [f"model.layers.{i}.{kind}" for i in range(32) for kind in "abcdefg"]
    rows = [
        {"step": step, "layer": layer, "first": step == 1, "failed": None, "similarity": step / 2e4, "energy": 0.9,
         "gap": 100, "next_refresh": step + 99, "seconds": 1.0, "angle_cosines": [0.1, 0.2, 0.3, 0.4, 0.5]}
        for step in range(1, 20001, 100) for layer in layers
    ]  # fmt: skip
    train = [
        {"step": step, "lr": 1.0, "loss": 3.0, "tokens_per_second": 1e3, "tokens": 10 * step}
        for step in range(1, 20001)
    ]
    run = records.Run(None, "long", {}, train, [], rows, 0)
    text = report.page([summary.summarise(run)])
    assert len(text) < 3e6
    for svg in parsed(text).iter("svg"):
        check_drawing(svg)


def test_names_are_escaped(recorded):
    folder, _ = recorded
    rows = [json.loads(line) for line in (folder / "subspace.jsonl").read_text().splitlines()]
    text = "".join(json.dumps({**row, "layer": f'<b>&"{row["layer"]}'}) + "\n" for row in rows)
    (folder / "subspace.jsonl").write_text(text)
    page = parsed(report.page([summary.summarise(records.read_run(folder))]))
    assert not list(page.iter("b"))


def test_the_heat_map_shows_each_similarity_from_its_refresh_to_the_next(recorded):
    run = records.read_run(recorded[0])
    svg = ET.fromstring(charts.similarity(run)).find("svg")
    (left, _), (right, _) = places(next(part for part in svg if part.get("class") == "frame"))
    cells = {}
    for part in svg:
        if part.get("fill"):
            name, words = part.find("title").text.split(": ")
            cells.setdefault(name, []).append((part, words))
    for name, found in cells.items():
        own = [row for row in run.refreshes if row["layer"] == name and row["similarity"] is not None]
        assert len(found) == len(own)
        for (cell, words), row, following in zip(found, own, [*own[1:], {"step": run.step}], strict=True):
            (start, _), (end, _) = places(cell)
            for place, step in ((start, row["step"]), (end, following["step"])):
                assert place == pytest.approx(left + (step - 1) / (run.step - 1) * (right - left), abs=0.11)
            assert words.startswith(f"similarity {row['similarity']:.3f}")
            assert cell.get("fill") == plot.shade(row["similarity"])


def test_points_lie_where_the_axes_say():
    points = [(0.0, 10.0), (50.0, 30.0), (100.0, 20.0)]
    svg = ET.fromstring(plot.lines("t", [plot.Series("s", points)], "x", "y", (0, 100), (10, 30))).find("svg")
    circles = [places(part)[0] for part in svg if part.tag == "circle"]
    width, height = plot.WIDTH - plot.LEFT - plot.RIGHT, plot.HEIGHT - plot.TOP - plot.BOTTOM
    wanted = [(plot.LEFT + x / 100 * width, plot.TOP + (30 - y) / 20 * height) for x, y in points]
    assert len(circles) == 3
    for circle, place in zip(circles, wanted, strict=True):
        assert circle == pytest.approx(place, abs=0.051)


@pytest.mark.parametrize("style", ["line", "steps", "dots", "band"])
def test_values_outside_the_limits_stay_inside_the_plot(style):
    points = [(-5.0, 40.0), (50.0, 0.0), (400.0, 20.0)]
    upper = [90.0, 15.0, -3.0] if style == "band" else []
    marks = [(-20, 3.0, "before the beginning")]
    text = plot.lines(
        "t", [plot.Series("s", points, style=style, upper=upper)], "x", "y", (0, 100), (10, 30), marks=marks
    )
    assert check_drawing(ET.fromstring(text).find("svg")) >= 1


@pytest.mark.parametrize("limits", [(0.0, 1.0), (3.0, 3.0), (-2e-6, 5e-6), (1, 123456), (5.5, 8.4)])
def test_ticks_are_round_few_and_inside(limits):
    ticks = plot.Axis(*limits, 0, 100).ticks()
    assert 1 <= len(ticks) <= 8
    slack = (limits[1] - limits[0]) * 1e-6
    assert all(limits[0] - slack <= tick <= limits[1] + slack for tick in ticks)
    if limits[0] != limits[1]:
        steps = {round((b - a) / (ticks[1] - ticks[0]), 6) for a, b in pairwise(ticks)}
        assert steps == {1.0}
        assert f"{ticks[1] - ticks[0]:.0e}"[0] in "125"


def test_shades_grow_lighter():
    def lightness(value):
        return sum(w * int(plot.shade(value)[i : i + 2], 16) for w, i in ((0.21, 1), (0.72, 3), (0.07, 5)))

    levels = [lightness(i / 20) for i in range(21)]
    assert levels == sorted(levels)
    assert plot.shade(-1) == plot.shade(0)
    assert plot.shade(2) == plot.shade(1)


def test_csv_holds_every_value(recorded):
    run = records.read_run(recorded[0])
    rows = list(csv.DictReader(io.StringIO(csv_rows.refresh_rows([run]))))
    assert len(rows) == len(run.refreshes)
    for got, wanted in zip(rows, run.refreshes, strict=True):
        assert (got["run"], got["layer"], int(got["step"])) == ("tiny", wanted["layer"], wanted["step"])
        for key in ("similarity", "energy", "energy_before", "moment2_zero", "int8_noise_share"):
            assert (float(got[key]) if got[key] else None) == wanted[key]
        assert [int(got["shape_0"]), int(got["shape_1"])] == wanted["shape"]
        assert got["first"] == json.dumps(wanted["first"])
        if wanted["angle_cosines"]:
            assert [float(got[f"angle_cosines_{i}"]) for i in range(5)] == wanted["angle_cosines"]


def test_csv_of_rows_of_different_versions(recorded):
    run = records.read_run(recorded[0])
    mixed = [{"step": 1, "layer": "old"}, {"step": 2, "layer": "new", "newer_key": 7}]
    rows = list(csv.DictReader(io.StringIO(csv_rows.refresh_rows([records.replace(run, refreshes=mixed)]))))
    assert [(row["layer"], row["energy"], row["newer_key"]) for row in rows] == [("old", "", ""), ("new", "", "7")]


def test_tensorboard_scalars_are_the_records(recorded):
    run = records.read_run(recorded[0])
    found = list(tensorboard.scalars(run))
    assert all(isinstance(value, (int, float)) for _, value, _ in found)
    losses = [(step, value) for tag, value, step in found if tag == "train/loss"]
    assert losses == [(row["step"], row["loss"]) for row in run.train]
    layer = run.refreshes[0]["layer"]
    energies = [value for tag, value, _ in found if tag == f"energy/{layer}"]
    assert energies == [row["energy"] for row in run.refreshes if row["layer"] == layer]
    first = [row["int8_changed"] for row in run.refreshes if row["step"] == 1]
    means = {step: value for tag, value, step in found if tag == "health/int8_changed"}
    assert means[1] == pytest.approx(sum(first) / len(first))


def test_tensorboard_files_can_be_read_back(recorded, tmp_path):
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = records.read_run(recorded[0])
    count = tensorboard.write(run, tmp_path / "board")
    assert count == len(list(tensorboard.scalars(run)))
    events = loader.EventAccumulator(str(tmp_path / "board" / "tiny"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 15))


def test_a_device_is_written_to_and_stays(tmp_path):
    link = tmp_path / "nowhere"
    link.symlink_to("/dev/null")
    write_report(link, "text")
    assert link.is_symlink()
    assert Path("/dev/null").is_char_device()
    assert [path.name for path in tmp_path.iterdir()] == ["nowhere"]
