"""Heat maps as SVG text: a row for each layer, a cell for each stretch of steps."""

import math
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise

from .plot import BOTTOM, RIGHT, TOP, WIDTH, Axis, axis_data, figure, text, x_axis

LEFT = 190  # room for the names of the groups
TALLEST, LOWEST, ALL_ROWS = 14.0, 2.0, 620  # pixels of a row, at most and at least, and of all rows where they fit
_STOPS = ((0.0, (49, 30, 104)), (0.35, (42, 105, 142)), (0.7, (69, 180, 120)), (1.0, (250, 226, 70)))

Cell = tuple[float, float, float]  # from, to, value


@dataclass(frozen=True)
class Scale:
    """Which values the darkest and the lightest colour mean; ``base`` 10 spaces powers of ten evenly."""

    low: float = 0.0
    high: float = 1.0
    base: int = 1

    def shade(self, value: float) -> str:
        return shade(Axis(self.low, self.high, 0.0, 1.0, self.base)(value))

    def legend(self) -> list[float]:
        if self.base == 1:
            return [self.low + i / 5 * (self.high - self.low) for i in range(6)]
        return [self.low * (self.high / self.low) ** (i / 5) for i in range(6)]


@dataclass(frozen=True)
class Map:
    """``rows`` (name, cells), of which ``groups`` (name, number of rows) label consecutive ones at the left; ``what``
    names a value under the pointer."""

    title: str
    what: str
    rows: list[tuple[str, list[Cell]]]
    groups: list[tuple[str, int]]
    note: str = ""
    scale: Scale = field(default_factory=Scale)


def shade(value: float) -> str:
    """A colour for 0 (dark blue) … 1 (yellow), of rising lightness, so that it also reads without colour vision."""
    value = min(1.0, max(0.0, value))
    for (low, dark), (high, light) in pairwise(_STOPS):
        if value <= high:
            part = (value - low) / (high - low)
            return "#" + "".join(f"{round(a + part * (b - a)):02x}" for a, b in zip(dark, light, strict=True))
    raise AssertionError("unreachable: the last stop is 1")


def _row(name: str, cells: list[Cell], x: Axis, top: float, height: float, scale: Scale) -> str:
    drawn = []
    for start, end, value in cells:
        a, b = x(start), x(end)
        place = f'x="{a:.1f}" y="{top:.1f}" width="{max(0.0, b - a):.1f}" height="{height:.1f}"'
        drawn.append(f'<rect {place} fill="{scale.shade(value)}"/>')
    return f"<g><title>{escape(name)}</title>{''.join(drawn)}</g>"


def heat_map(drawn: Map, x_label: str, x_limits: tuple[float, float]) -> str:
    """The figure; "" if no row has a cell."""
    rows, scale = drawn.rows, drawn.scale
    if not any(cells for _, cells in rows):
        return ""
    row = min(TALLEST, max(LOWEST, ALL_ROWS / len(rows)))
    bottom = TOP + row * len(rows)
    height = math.ceil(bottom) + BOTTOM
    x = Axis(*x_limits, LEFT, WIDTH - RIGHT)
    parts = x_axis(x, bottom, x_label, height)
    parts += [_row(name, cells, x, TOP + i * row, row, scale) for i, (name, cells) in enumerate(rows)]
    top = TOP
    for name, count in drawn.groups:
        parts.append(f'<line class="mark" x1="{LEFT - 4}" x2="{WIDTH - RIGHT}" y1="{top:.1f}" y2="{top:.1f}"/>')
        parts.append(text(LEFT - 8, top + row * count / 2 + 4, name, "end"))
        top += row * count
    frame = f'x="{LEFT}" y="{TOP}" width="{WIDTH - RIGHT - LEFT}" height="{bottom - TOP:.1f}"'
    parts.append(f'<rect class="frame" {frame}/>')
    patches = "".join(
        f'<span class="shade"><i style="background:{scale.shade(value)}"></i>{value:.2g}</span>'
        for value in scale.legend()
    )
    cells = [[name, [[start, end, float(f"{value:.4g}")] for start, end, value in found]] for name, found in rows]
    data = {"x": axis_data(x, x_label), "what": drawn.what, "top": TOP, "bottom": bottom, "rows": cells}
    return figure(drawn.title, WIDTH, height, parts, f'<p class="legend">{patches}</p>', data, drawn.note)
