"""Line plots as SVG text, with no library: a page must open anywhere, years later, without a network.

Colours are CSS classes (``s0`` … ``s7``, ``STYLE`` defines them for light and dark pages). Their order and values were
searched so that any two stay apart under the three kinds of colour blindness, which a test holds them to. Each figure
carries its values as JSON, which ``page.js`` shows under the pointer; without scripts the drawing stays as it is.
All coordinates lie inside the view box by construction: values are clamped.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 860, 300
LEFT, RIGHT, TOP, BOTTOM = 70, 16, 14, 46  # of the plot's area inside the drawing
COLOURS = 8
MAX_DOTS = 60  # marks on one line

_LIGHT = ("#4095ff", "#9a2b1c", "#007361", "#ac7b00", "#7b17df", "#f15db6", "#3c368e", "#141325")
_DARK = ("#99cffa", "#d9864d", "#15fa9d", "#e9e345", "#a070ff", "#c896a7", "#6984c4", "#e7ffff")


def _palette(colours: Sequence[str]) -> str:
    return "".join(f"--s{i}:{colour};" for i, colour in enumerate(colours))


_BY_DAY = f"--ink:#1c1c1c;--faint:#8a8a8a;--rule:#dddddd;--page:#ffffff;{_palette(_LIGHT)}"
STYLE = (
    f":root{{color-scheme:light dark;{_BY_DAY}}}"
    "@media(prefers-color-scheme:dark){:root{--ink:#e8e8e8;--faint:#9a9a9a;--rule:#3a3a3a;--page:#161616;"
    f"{_palette(_DARK)}}}}}"
    "svg{max-width:100%;height:auto}svg text{font:12px sans-serif;fill:var(--ink)}"
    ".grid{stroke:var(--rule)}.frame{stroke:var(--faint);fill:none}.mark{stroke:var(--faint);stroke-width:1}"
    "g rect{shape-rendering:crispEdges}"
    ".line{fill:none;stroke-width:1.6}.dashed{stroke-dasharray:5 4}.band{stroke:none;opacity:.18}.faint{opacity:.35}"
    ".again{stroke-dasharray:9 3}.cursor{stroke:var(--ink);stroke-width:1;pointer-events:none}.off{display:none}"
    + "".join(
        f".s{i}{{stroke:var(--s{i})}}.f{i}{{fill:var(--s{i})}}.b{i}{{background-color:var(--s{i})}}"
        for i in range(COLOURS)
    )
)


@dataclass(frozen=True)
class Axis:
    """Maps values low … high to pixels start … end; ``base`` 2 or 10 spaces its powers evenly."""

    low: float
    high: float
    start: float
    end: float
    base: int = 1

    def __call__(self, value: float) -> float:
        low, high, value = (self._place(v) for v in (self.low, self.high, value))
        share = 0.5 if high == low else (value - low) / (high - low)
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)

    def _place(self, value: float) -> float:
        return value if self.base == 1 else math.log(max(value, 1e-12), self.base)

    def ticks(self) -> list[float]:
        """Up to seven round values inside the axis."""
        if self.base != 1:
            first, last = math.ceil(self._place(self.low) - 1e-9), math.floor(self._place(self.high) + 1e-9)
            return [float(self.base**power) for power in range(first, last + 1, max(1, (last - first) // 6))]
        span = self.high - self.low
        if span <= 0:
            return [self.low]
        rough = span / 6
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * (1 - 1e-9))
        first = math.ceil(self.low / step - 1e-9)
        return [step * i for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class Series:
    """Points (x, y), or a band where ``upper`` gives a second y for each point. ``style``: ``line``, ``dashed``,
    ``faint`` (without dots), ``dots`` or ``steps`` (a value holds until the next point). Series of one label are
    switched together. Colours from ``COLOURS`` on repeat the first ones with a broken line."""

    label: str
    points: list[tuple[float, float]]
    colour: int = 0
    style: str = "line"
    upper: list[float] = field(default_factory=list)


def number(value: float) -> str:
    """A short form for an axis or a tooltip."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def padded(values: Sequence[float], share: float = 0.05) -> tuple[float, float]:
    """Limits around ``values`` with a margin; a single value gets room on both sides."""
    low, high = min(values), max(values)
    room = (high - low) * share or abs(high) * share or 1.0
    return low - room, high + room


def text(x: float, y: float, words: str, anchor: str = "start", extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{escape(words)}</text>'


def _grid(x: Axis, y: Axis, x_label: str, y_label: str, height: float) -> list[str]:
    parts = []
    for value in y.ticks():
        at = y(value)
        parts.append(f'<line class="grid" x1="{x.start}" x2="{x.end}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(text(x.start - 6, at + 4, number(value), "end"))
    parts += x_axis(x, y.start, x_label, height)
    middle = (y.start + y.end) / 2
    parts.append(text(14, middle, y_label, "middle", f' transform="rotate(-90 14 {middle:.1f})"'))
    parts.append(
        f'<rect class="frame" x="{x.start}" y="{y.end}" width="{x.end - x.start}" height="{y.start - y.end}"/>'
    )
    return parts


def x_axis(x: Axis, bottom: float, label: str, height: float) -> list[str]:
    parts = [text((x.start + x.end) / 2, height - 8, label, "middle")]
    for value in x.ticks():
        at = x(value)
        parts.append(f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{bottom:.1f}" y2="{bottom + 4:.1f}"/>')
        parts.append(text(at, bottom + 17, number(value), "middle"))
    return parts


def _corners(series: Series, places: list[tuple[float, float]]) -> str:
    """The points of a line for SVG; those of ``steps`` with the corners between them."""
    if series.style == "steps":
        places = [p for (a, b), (c, _) in pairwise(places) for p in ((a, b), (c, b))] + places[-1:]
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in places)


def _draw(series: Series, key: int, x: Axis, y: Axis) -> list[str]:
    colour, name = series.colour % COLOURS, f"<title>{escape(series.label)}</title>"
    places = [(x(a), y(b)) for a, b in series.points]
    if series.upper:
        places += [(x(a), y(top)) for (a, _), top in zip(series.points, series.upper, strict=True)][::-1]
        outline = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        return [f'<polygon class="band f{colour}" data-key="{key}" points="{outline}">{name}</polygon>']
    parts = []
    if series.style != "dots":
        style = series.style if series.style in ("dashed", "faint") else "again" if series.colour >= COLOURS else ""
        kind = f"line s{colour} {style}".rstrip()
        outline = _corners(series, places)
        parts.append(f'<polyline class="{kind}" data-key="{key}" points="{outline}">{name}</polyline>')
    if series.style == "faint":
        return parts
    every = math.ceil(len(places) / MAX_DOTS)
    parts += [
        f'<circle class="f{colour}" data-key="{key}" cx="{at:.1f}" cy="{height:.1f}" r="2.4">{name}</circle>'
        for at, height in places[::every]
    ]
    return parts


def _switches(series: list[Series], labels: list[str]) -> str:
    """A button for each label, as HTML beside the drawing: text that wraps."""
    colours = {one.label: one.colour for one in reversed(series)}
    cells = "".join(
        f'<button type="button" class="key" aria-pressed="true" data-key="{key}"><i class="b{colours[label] % COLOURS}'
        f'{" broken" if colours[label] >= COLOURS else ""}"></i>{escape(label)} <em></em></button>'
        for key, label in enumerate(labels)
    )
    return f'<p class="legend">{cells}</p>'


def _short(value: float) -> float:
    """Six digits, which is more than a plot shows; whole numbers stay whole."""
    return value if isinstance(value, int) else float(f"{value:.6g}")


def axis_data(axis: Axis, label: str) -> dict:
    """What the script needs to turn a place into a value."""
    ends = {"low": _short(axis.low), "high": _short(axis.high), "start": axis.start, "end": axis.end}
    return {"label": label, **ends, "base": axis.base}


def _data(series: list[Series], labels: list[str], x: Axis, y: Axis, names: tuple[str, str]) -> dict:
    found = []
    for one in series:
        entry: dict = {"key": labels.index(one.label), "points": [[_short(a), _short(b)] for a, b in one.points]}
        if one.upper:
            entry["upper"] = [_short(top) for top in one.upper]
        if one.style == "steps":
            entry["holds"] = True
        found.append(entry)
    return {"x": axis_data(x, names[0]), "y": axis_data(y, names[1]), "names": labels, "series": found}


def lines(
    title: str,
    series: list[Series],
    x_label: str,
    y_label: str,
    x_limits: tuple[float, float] | None = None,
    y_limits: tuple[float, float] | None = None,
    base: int = 1,
    marks: Sequence[tuple[float, float, str]] = (),
) -> str:
    """A figure with ``series``; "" if none of them has a point. ``marks`` (x, share, words): ticks on the upper edge
    whose length is a share of a fifth of the plot. ``base`` 2 or 10 makes the y axis logarithmic."""
    series = [one for one in series if one.points]
    if not series:
        return ""
    x, y = _axes(series, x_limits, y_limits, base)
    parts = _grid(x, y, x_label, y_label, HEIGHT)
    for at, share, words in marks:
        length = (HEIGHT - BOTTOM - TOP) / 5 * min(1.0, share)
        parts.append(
            f'<line class="mark" x1="{x(at):.1f}" x2="{x(at):.1f}" y1="{TOP}" y2="{TOP + length:.1f}">'
            f"<title>{escape(words)}</title></line>"
        )
    labels = list(dict.fromkeys(one.label for one in series))
    for one in series:
        parts += _draw(one, labels.index(one.label), x, y)
    data = _data(series, labels, x, y, (x_label, y_label))
    return figure(title, WIDTH, HEIGHT, parts, _switches(series, labels), data)


def _axes(series: list[Series], x_limits=None, y_limits=None, base: int = 1) -> tuple[Axis, Axis]:
    xs = [a for one in series for a, _ in one.points]
    ys = [b for one in series for _, b in one.points] + [top for one in series for top in one.upper]
    x = Axis(*(x_limits or padded(xs, 0.01)), LEFT, WIDTH - RIGHT)
    return x, Axis(*(y_limits or ((min(ys), max(ys)) if base != 1 else padded(ys))), HEIGHT - BOTTOM, TOP, base)


def picture(series: list[Series], x_label: str, y_label: str) -> str:
    """A drawing of ``series``, each of which has a point, as a file of its own (SVG)."""
    x, y = _axes(series)
    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="var(--page)"/>', *_grid(x, y, x_label, y_label, HEIGHT)]
    for place, one in enumerate(series):
        parts += _draw(one, place, x, y)
        colour = f' style="fill:var(--s{one.colour})"'
        parts.append(text(WIDTH - RIGHT - 8 - 110 * place, TOP + 16, one.label, "end", colour))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    drawn = "\n".join([f'{head} role="img" aria-label="{y_label}">', f"<style>{STYLE}</style>", *parts, "</svg>\n"])
    for name, colour in re.findall(r"(--\w+):(#\w+)", _BY_DAY):  # not every program that draws a file knows variables
        drawn = drawn.replace(f"var({name})", colour)
    return drawn


def figure(title: str, width: float, height: float, parts: list[str], legend: str, data: dict, note: str = "") -> str:
    """A drawing with its title and legend, an empty line for what the pointer is on, and ``data`` for the script."""
    note = f"<p>{escape(note)}</p>" if note else ""
    drawing = f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">'
    # Without these three characters no text in it can end the element, and HTML and XML read it alike.
    values = json.dumps(data, separators=(",", ":"), ensure_ascii=False)
    for sign in "<>&":
        values = values.replace(sign, f"\\u{ord(sign):04x}")
    return (
        f"<figure><h3>{escape(title)}</h3>{note}{legend}<output></output>{drawing}{''.join(parts)}</svg>"
        f'<script type="application/json">{values}</script></figure>'
    )
