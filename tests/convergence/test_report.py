"""The page is parsed as XML; every coordinate must lie in its plot, and data and its values where the records say."""

import csv
import io
import json
import math
import xml.etree.ElementTree as ET
from itertools import combinations, pairwise
from pathlib import Path

import pytest

from qgalore.convergence import charts, csv_rows, heat, maps, plot, records, report, summary, tensorboard
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
    pieces = [*svg, *(rect for group in svg.iter("g") for rect in group.iter("rect"))]
    for part in (piece for piece in pieces if piece.tag != "g"):
        drawn = places(part)
        assert all(0 <= x <= width and 0 <= y <= height for x, y in drawn), ET.tostring(part)
        if part.tag in ("polyline", "polygon", "circle") or part.get("fill"):
            data += 1
            # coordinates are written with one decimal
            assert all(left - 0.1 <= x <= right + 0.1 and top - 0.1 <= y <= bottom + 0.1 for x, y in drawn)
            assert part.tag == "rect" or part.find("title").text
    assert all(group.find("title").text for group in svg.iter("g"))
    labels = [part.text for part in svg if part.tag == "text"]
    assert len(labels) >= 4
    return data


def test_the_page_of_a_real_run(recorded):
    run = records.read_run(recorded[0])
    page = parsed(report.page([summary.summarise(run)]))
    figures = list(page.iter("figure"))
    assert len(figures) == len(report.FIGURES)
    for figure in figures:
        assert check_drawing(figure.find("svg")) > 0
        assert list(figure.iter("span")) or list(figure.iter("button")), "a legend"
    assert page.find("head/style").text.count("prefers-color-scheme:dark") == 1
    assert not list(page.iter("meta"))[1:]


def test_it_refers_to_nothing_outside(recorded):
    found = [summary.summarise(records.read_run(recorded[0]))] * 2
    text = report.page(found, reload_seconds=5)
    for sign in ("http:", "https:", "src=", "href=", "url(", "@import", "<link", "fetch(", "import("):
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


def values(figure: ET.Element) -> dict:
    """What the script reads."""
    return json.loads(figure.find("script").text)


def test_the_heat_map_shows_each_similarity_from_its_refresh_to_the_next(recorded):
    run = records.read_run(recorded[0])
    figure = ET.fromstring(maps.similarity(run))
    svg = figure.find("svg")
    (left, _), (right, _) = places(next(part for part in svg if part.get("class") == "frame"))
    rows = {group.find("title").text: list(group.iter("rect")) for group in svg.iter("g")}
    told = dict(values(figure)["rows"])
    assert set(rows) == set(told) == {row["layer"] for row in run.refreshes}
    for name, cells in rows.items():
        own = [row for row in run.refreshes if row["layer"] == name and row["similarity"] is not None]
        following = [*(row["step"] for row in own[1:]), run.step]
        wanted = [[row["step"], end, row["similarity"]] for row, end in zip(own, following, strict=True)]
        assert [cell[:2] for cell in told[name]] == [cell[:2] for cell in wanted]
        assert [cell[2] for cell in told[name]] == pytest.approx([cell[2] for cell in wanted], rel=5e-4)
        for cell, (start, end, value) in zip(cells, wanted, strict=True):
            assert cell.get("fill") == heat.shade(value)
            for (place, _), step in zip(places(cell), (start, end), strict=True):
                assert place == pytest.approx(left + step / run.step * (right - left), abs=0.11)


def test_the_values_under_the_pointer_are_those_of_the_records(recorded):
    run = records.read_run(recorded[0])
    told = values(ET.fromstring(charts.loss(run)))
    named = {told["names"][one["key"]]: one["points"] for one in told["series"]}
    for name, rows, key in (("train, each step", run.train, "loss"), ("held out", run.evaluations, "eval_loss")):
        assert [step for step, _ in named[name]] == [row["step"] for row in rows]
        assert [value for _, value in named[name]] == pytest.approx([row[key] for row in rows], rel=1e-5)
    assert told["x"] == {
        "label": "step",
        "low": 0,
        "high": 14,
        "start": plot.LEFT,
        "end": plot.WIDTH - plot.RIGHT,
        "base": 1,
    }
    ranks = values(ET.fromstring(charts.ranks(run)))
    assert all(one["holds"] for one in ranks["series"])
    assert {value for one in ranks["series"] for _, value in one["points"]} == {40}
    band = next(one for one in values(ET.fromstring(charts.energy(run)))["series"] if "upper" in one)
    assert all(low <= high for (_, low), high in zip(band["points"], band["upper"], strict=True))


def test_each_held_out_set_with_a_name_is_a_line(recorded):
    folder, _ = recorded
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    named = [{"step": step, "eval_loss/code": 3.0 - step / 10, "eval_loss/<prose>": 2.0} for step in (0, 7, 14)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*named, *rows]))
    told = values(ET.fromstring(charts.loss(records.read_run(folder))))
    lines = {told["names"][one["key"]]: one["points"] for one in told["series"]}
    assert lines["held out, code"] == [[0, 3.0], [7, 2.3], [14, 1.6]]
    assert lines["held out, <prose>"] == [[0, 2.0], [7, 2.0], [14, 2.0]]
    assert [step for step, _ in lines["held out"]] == [0, 7, 14]
    assert told["x"]["low"] == 0, "a loss before the first step has its place"


def test_a_mixture_of_thousands_of_experts_stays_small():
    layers = [f"model.layers.{i}.mlp.experts.{kind}.{e}" for i in range(8) for kind in "abc" for e in range(100)]
    rows = [{"step": step, "layer": layer, "similarity": (n % 4) / 4, "gap": 4} for step in range(1, 60, 4)
            for n, layer in enumerate(layers)]  # fmt: skip
    train = [{"step": step, "lr": 1.0, "loss": 3.0} for step in range(1, 61)]
    drawn = maps.similarity(records.Run(None, "many", {}, train, [], rows, 0))
    assert len(drawn) < 1.5e6
    found = values(ET.fromstring(drawn))["rows"]
    assert len(found) == maps.MAX_ROWS
    assert found[0][0].endswith("mean of 4 layers")
    assert found[0][1][0] == [1, 5, 0.375]  # of 0, 0.25, 0.5 and 0.75


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
        return sum(w * int(heat.shade(value)[i : i + 2], 16) for w, i in ((0.21, 1), (0.72, 3), (0.07, 5)))

    levels = [lightness(i / 20) for i in range(21)]
    assert levels == sorted(levels)
    assert heat.shade(-1) == heat.shade(0)
    assert heat.shade(2) == heat.shade(1)


# How cones that lack one pigment see linear sRGB: Machado, Oliveira and Fernandes (2009), at full severity.
SEEN = {
    "as it is": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": ((0.1523, 1.0526, -0.2049), (0.1145, 0.7863, 0.0992), (-0.0039, -0.0481, 1.0520)),
    "deuteranopia": ((0.3673, 0.8606, -0.2280), (0.2801, 0.6725, 0.0474), (-0.0118, 0.0429, 0.9689)),
    "tritanopia": ((1.2555, -0.0767, -0.1788), (-0.0784, 0.9308, 0.1476), (0.0047, 0.6914, 0.3039)),
}
TO_XYZ = ((0.4339, 0.3762, 0.1899), (0.2127, 0.7152, 0.0721), (0.0178, 0.1095, 0.8730))  # relative to white


def linear(colour):
    parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]


def times(matrix, vector):
    return [sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]


def lab(colour, kind):
    rgb = [min(1.0, max(0.0, part)) for part in times(SEEN[kind], linear(colour))]
    x, y, z = (part ** (1 / 3) if part > 0.008856 else 7.787 * part + 16 / 116 for part in times(TO_XYZ, rgb))
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


@pytest.mark.parametrize(("palette", "page", "contrast"), [(plot._LIGHT, "#ffffff", 3), (plot._DARK, "#161616", 4.5)])
def test_colours_stay_apart_for_every_eye_and_from_the_page(palette, page, contrast):
    for kind in SEEN:
        assert min(math.dist(lab(a, kind), lab(b, kind)) for a, b in combinations(palette, 2)) > 24, kind
    light = [sorted((linear_light(colour), linear_light(page))) for colour in palette]
    assert all((more + 0.05) / (less + 0.05) >= contrast for less, more in light)


def linear_light(colour):
    return times(TO_XYZ, linear(colour))[1]


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
