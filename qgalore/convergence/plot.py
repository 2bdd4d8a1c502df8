"""Line plots and heat maps as SVG text, with no library: a report must open anywhere, years later, without a network.

Colours are CSS classes (``s0`` … ``s7``, ``STYLE`` defines them for light and dark pages); every mark has a ``<title>``
that a browser shows under the pointer. All coordinates lie inside the view box by construction: values are clamped.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 860, 300
LEFT, RIGHT, TOP, BOTTOM = 70, 16, 14, 46  # of the plot's area inside the drawing
COLOURS = 8
MAX_DOTS = 60  # marks with a tooltip on one line

_LIGHT = ("#0b62a8", "#c75000", "#11815a", "#a8488a", "#7a6a00", "#1f8fa8", "#8a2be2", "#555555")
_DARK = ("#6cb6ff", "#ff9d57", "#4fd1a0", "#ff9bd8", "#e0cc4a", "#67dcf0", "#c6a0ff", "#c0c0c0")


def _palette(colours: Sequence[str]) -> str:
    return "".join(f"--s{i}:{colour};" for i, colour in enumerate(colours))


STYLE = (
    f":root{{color-scheme:light dark;--ink:#1c1c1c;--faint:#8a8a8a;--rule:#dddddd;--page:#ffffff;{_palette(_LIGHT)}}}"
    "@media(prefers-color-scheme:dark){:root{--ink:#e8e8e8;--faint:#9a9a9a;--rule:#3a3a3a;--page:#161616;"
    f"{_palette(_DARK)}}}}}"
    "svg{max-width:100%;height:auto}svg text{font:12px sans-serif;fill:var(--ink)}"
    ".grid{stroke:var(--rule)}.frame{stroke:var(--faint);fill:none}.mark{stroke:var(--faint);stroke-width:1}"
    ".line{fill:none;stroke-width:1.6}.dashed{stroke-dasharray:5 4}.band{stroke:none;opacity:.18}.faint{opacity:.35}"
    + "".join(f".s{i}{{stroke:var(--s{i})}}.f{i}{{fill:var(--s{i})}}" for i in range(COLOURS))
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
    ``faint`` (without tooltips), ``dots`` or ``steps`` (a value holds until the next point)."""

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


def _text(x: float, y: float, text: str, anchor: str = "start", extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{escape(text)}</text>'


def _grid(x: Axis, y: Axis, x_label: str, y_label: str, height: float) -> list[str]:
    parts = []
    for value in y.ticks():
        at = y(value)
        parts.append(f'<line class="grid" x1="{x.start}" x2="{x.end}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(_text(x.start - 6, at + 4, number(value), "end"))
    parts += _x_axis(x, y.start, x_label, height)
    middle = (y.start + y.end) / 2
    parts.append(_text(14, middle, y_label, "middle", f' transform="rotate(-90 14 {middle:.1f})"'))
    parts.append(
        f'<rect class="frame" x="{x.start}" y="{y.end}" width="{x.end - x.start}" height="{y.start - y.end}"/>'
    )
    return parts


def _x_axis(x: Axis, bottom: float, label: str, height: float) -> list[str]:
    parts = [_text((x.start + x.end) / 2, height - 8, label, "middle")]
    for value in x.ticks():
        at = x(value)
        parts.append(f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{bottom:.1f}" y2="{bottom + 4:.1f}"/>')
        parts.append(_text(at, bottom + 17, number(value), "middle"))
    return parts


def _draw(series: Series, x: Axis, y: Axis) -> list[str]:
    colour, name = series.colour % COLOURS, escape(series.label)
    places = [(x(a), y(b)) for a, b in series.points]
    if series.upper:
        corners = places + [(x(a), y(top)) for (a, _), top in zip(series.points, series.upper, strict=True)][::-1]
        outline = " ".join(f"{a:.1f},{b:.1f}" for a, b in corners)
        return [f'<polygon class="band f{colour}" points="{outline}"><title>{name}</title></polygon>']
    parts = []
    if series.style != "dots":
        if series.style == "steps":
            places_drawn = [p for (a, b), (c, _) in pairwise(places) for p in ((a, b), (c, b))]
            places_drawn += places[-1:]
        else:
            places_drawn = places
        extra = f" {series.style}" if series.style in ("dashed", "faint") else ""
        outline = " ".join(f"{a:.1f},{b:.1f}" for a, b in places_drawn)
        parts.append(f'<polyline class="line s{colour}{extra}" points="{outline}"><title>{name}</title></polyline>')
    if series.style == "faint":
        return parts
    every = math.ceil(len(places) / MAX_DOTS)
    for (a, b), (at, height) in list(zip(series.points, places, strict=True))[::every]:
        words = f"{name}: {number(b)} at {number(a)}"
        parts.append(
            f'<circle class="f{colour}" cx="{at:.1f}" cy="{height:.1f}" r="2.4"><title>{words}</title></circle>'
        )
    return parts


def _legend(entries: list[tuple[str, str]]) -> str:
    """Colour patches and names, as HTML beside the drawing: text that wraps."""
    cells = "".join(
        f'<span class="key"><i style="background:{fill}"></i>{escape(name)}</span>' for name, fill in entries
    )
    return f'<p class="legend">{cells}</p>'


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
    xs = [a for one in series for a, _ in one.points]
    ys = [b for one in series for _, b in one.points] + [top for one in series for top in one.upper]
    x = Axis(*(x_limits or padded(xs, 0.01)), LEFT, WIDTH - RIGHT)
    y = Axis(*(y_limits or ((min(ys), max(ys)) if base != 1 else padded(ys))), HEIGHT - BOTTOM, TOP, base)
    parts = _grid(x, y, x_label, y_label, HEIGHT)
    for at, share, words in marks:
        length = (HEIGHT - BOTTOM - TOP) / 5 * min(1.0, share)
        parts.append(
            f'<line class="mark" x1="{x(at):.1f}" x2="{x(at):.1f}" y1="{TOP}" y2="{TOP + length:.1f}">'
            f"<title>{escape(words)}</title></line>"
        )
    for one in series:
        parts += _draw(one, x, y)
    shown = [(one.label, f"var(--s{one.colour % COLOURS})") for one in series if one.style != "faint"]
    return figure(title, WIDTH, HEIGHT, parts, _legend(list(dict.fromkeys(shown))))


def shade(value: float) -> str:
    """A colour for 0 (dark blue) … 1 (yellow), of rising lightness, so that it also reads without colour vision."""
    stops = ((0.0, (49, 30, 104)), (0.35, (42, 105, 142)), (0.7, (69, 180, 120)), (1.0, (250, 226, 70)))
    value = min(1.0, max(0.0, value))
    for (low, dark), (high, light) in pairwise(stops):
        if value <= high:
            part = (value - low) / (high - low)
            return "#" + "".join(f"{round(a + part * (b - a)):02x}" for a, b in zip(dark, light, strict=True))
    raise AssertionError("unreachable: the last stop is 1")


def heat_map(
    title: str,
    rows: list[tuple[str, list[tuple[float, float, float, str]]]],
    groups: list[tuple[str, int]],
    x_label: str,
    x_limits: tuple[float, float],
    scale_label: str,
) -> str:
    """A figure with a line of cells (from, to, value in 0 … 1, words) for each of ``rows`` (name, cells). ``groups``
    (name, number of rows) label consecutive rows at the left."""
    if not any(cells for _, cells in rows):
        return ""
    row = min(14.0, max(2.0, 620 / len(rows)))
    left = 190
    bottom = TOP + row * len(rows)
    height = math.ceil(bottom) + BOTTOM
    x = Axis(*x_limits, left, WIDTH - RIGHT)
    parts = _x_axis(x, bottom, x_label, height)
    for index, (name, cells) in enumerate(rows):
        top = TOP + index * row
        for start, end, value, words in cells:
            a, b = x(start), x(end)
            parts.append(
                f'<rect x="{a:.1f}" y="{top:.1f}" width="{max(0.0, b - a):.1f}" height="{row:.1f}" '
                f'fill="{shade(value)}"><title>{escape(name)}: {escape(words)}</title></rect>'
            )
    top = TOP
    for name, count in groups:
        parts.append(f'<line class="mark" x1="{left - 4}" x2="{WIDTH - RIGHT}" y1="{top:.1f}" y2="{top:.1f}"/>')
        parts.append(_text(left - 8, top + row * count / 2 + 4, name, "end"))
        top += row * count
    parts.append(
        f'<rect class="frame" x="{left}" y="{TOP}" width="{WIDTH - RIGHT - left}" height="{bottom - TOP:.1f}"/>'
    )
    keys = [(number(value), shade(value)) for value in (0, 0.2, 0.4, 0.6, 0.8, 1)]
    return figure(title, WIDTH, height, parts, _legend(keys), scale_label)


def figure(title: str, width: float, height: float, parts: list[str], legend: str, note: str = "") -> str:
    note = f"<p>{escape(note)}</p>" if note else ""
    drawing = f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">'
    return f"<figure><h3>{escape(title)}</h3>{note}{legend}{drawing}{''.join(parts)}</svg></figure>"
