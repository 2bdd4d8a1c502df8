"""The page in a real browser: what the pointer shows, and what a click on a name does. Skipped where there is none."""

import json
import re
import shutil
import subprocess
from html import unescape

import pytest

from qgalore.convergence import records, report, summary

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((found for name in NAMES if (found := shutil.which(name))), None)

# Points at places of figures, clicks, and writes what the page then shows into its last element.
ACTIONS = """
const figures = [...document.querySelectorAll("figure")];
const titled = (start) => figures.find((one) => one.querySelector("h3").textContent.startsWith(start));
const data = (figure) => JSON.parse(figure.querySelector("script").textContent);
const send = (figure, kind, x, y) => {
  const svg = figure.querySelector("svg"), at = new DOMPoint(x, y).matrixTransform(svg.getScreenCTM());
  svg.dispatchEvent(new PointerEvent(kind, { clientX: at.x, clientY: at.y, bubbles: true }));
};
const pixel = (axis, step) => axis.start + (step - axis.low) / (axis.high - axis.low) * (axis.end - axis.start);
const shown = (figure) => ({
  words: figure.querySelector("output").textContent,
  names: [...figure.querySelectorAll("button")].map((one) => one.textContent.trim()),
  cursor: +figure.querySelector(".cursor").getAttribute("x1"),
  hidden: figure.querySelector(".cursor").classList.contains("off"),
  lines: [...figure.querySelectorAll("polyline")].map((one) => getComputedStyle(one).display !== "none"),
});
const map = titled("Similarity"), loss = titled("Loss"), told = data(map);
const height = (told.bottom - told.top) / told.rows.length;
const found = {};
send(map, "pointermove", pixel(told.x, 9.4), told.top + 2.5 * height);
found.map = shown(map);
found.linked = shown(loss);
send(map, "pointerleave", 0, 0);
found.left = shown(loss);
const [each, mean] = loss.querySelectorAll("button");
mean.click();
found.off = shown(loss);
const frame = data(loss);
const first = frame.series[0].points[4];
send(loss, "pointermove", pixel(frame.x, first[0]), 100);
found.nearest = shown(loss);
send(loss, "click", pixel(frame.x, 11), 100);
send(loss, "pointermove", pixel(frame.x, 2), 100);
found.held = shown(titled("Throughput"));
mean.click();
mean.dispatchEvent(new MouseEvent("dblclick", { bubbles: true }));
found.alone = shown(loss);
mean.dispatchEvent(new MouseEvent("dblclick", { bubbles: true }));
found.all = shown(loss);
const last = document.createElement("pre");
last.id = "found";
last.textContent = JSON.stringify(found);
document.body.append(last);
"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_pointing_and_clicking(recorded, tmp_path):
    run = records.read_run(recorded[0])
    place = tmp_path / "page.html"
    text = report.page([summary.summarise(run)])
    place.write_text(text.replace("</body>", f"<script>{ACTIONS}</script></body>"), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    answer = subprocess.run(
        [BROWSER, *options, "--window-size=1000,3000", "--dump-dom", place.as_uri()],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    told = re.search(r'<pre id="found">(.*?)</pre>', answer.stdout, flags=re.S)
    assert told, answer.stderr[-2000:]
    found = json.loads(unescape(told[1]))
    layers = list(summary.by_layer(run.refreshes).items())
    name, rows = layers[2]
    steps = [row["step"] for row in rows if row["similarity"] is not None]
    start = max(step for step in steps if step <= 9.4)
    value = next(row["similarity"] for row in rows if row["step"] == start)
    words = re.fullmatch(r"(\S+), step (\d+) to (\d+): similarity ([\d.]+)", found["map"]["words"])
    assert (words[1], int(words[2])) == (name, start)
    assert int(words[3]) == next((step for step in steps if step > 9.4), run.step)
    assert float(words[4]) == pytest.approx(value, rel=1e-3)

    assert found["linked"]["words"] == "step 9"
    assert found["linked"]["names"][0] == f"train, each step {run.train[8]['loss']:.4g}"
    assert not found["linked"]["hidden"]
    assert found["left"]["hidden"]
    assert found["left"]["names"][0] == "train, each step"

    assert found["off"]["lines"] == [True, False, True]
    losses = {row["step"]: row["loss"] for row in run.train}
    seen = re.fullmatch(r"train, each step, step 5: ([\d.]+)", found["nearest"]["words"])
    assert float(seen[1]) == pytest.approx(losses[5], rel=1e-3)
    assert found["held"]["words"] == "step 11", "a click holds the step"
    assert found["alone"]["lines"] == [False, True, False]
    assert found["all"]["lines"] == [True, True, True]
