"""The heat maps of a page: one value of every layer over the steps."""

from bisect import bisect_right
from collections.abc import Callable
from math import ceil
from statistics import fmean

from .charts import STEP, Points, steps_of
from .heat import Cell, Map, Scale, heat_map
from .records import Row, Run, number
from .summary import by_layer, kind_of
from .updates import momentum_error, relative

MAX_CELLS = 9000  # of one map, so that a long run of a large model stays a file that a browser opens
MAX_ROWS = 600  # beyond it, as in mixtures with thousands of experts, layers of a kind share a row
WIDEST = 1e-9  # the darkest colour of a logarithmic scale, relative to the lightest

Value = Callable[[Row], float | None]


def _rows(layers: dict[str, list[Row]], value: Value) -> list[tuple[str, str, Points]]:
    """(kind, name, points) of each row. Where there are too many layers, neighbours of one kind are taken together."""
    together = ceil(len(layers) / MAX_ROWS)
    groups: dict[str, list[str]] = {}
    for layer in layers:
        groups.setdefault(kind_of(layer), []).append(layer)
    rows = []
    for kind, names in groups.items():
        for i in range(0, len(names), together):
            part = names[i : i + together]
            found = [(row["step"], known) for name in part for row in layers[name] if (known := value(row)) is not None]
            name = part[0] if len(part) == 1 else f"{part[0]} to {part[-1]}, mean of {len(part)} layers"
            rows.append((kind, name, sorted(found)))
    return rows


def _cells(points: Points, last: int, room: int) -> list[Cell]:
    """A value holds until the next one. Where there is no ``room`` for all, neighbours share a cell and its mean."""
    steps = sorted({step for step, _ in points})
    size = max(1, -(-len(steps) // room))
    starts = steps[::size]
    values: list[list[float]] = [[] for _ in starts]
    for step, value in points:
        values[bisect_right(starts, step) - 1].append(value)
    ends = [*starts[1:], max(2, last, *steps[-1:])]
    return [(start, end, fmean(held)) for start, end, held in zip(starts, ends, values, strict=False)]


def _by_layer(run: Run, rows: list[Row], value: Value, title: str, what: str, note: str, scale: Scale | None) -> str:
    """The map of ``value`` for every layer. Without a ``scale`` the colours span the values, in powers of ten."""
    found = _rows(by_layer(rows), value)
    room = max(5, MAX_CELLS // max(1, len(found)))
    cells = [(name, _cells(points, run.step, room)) for _, name, points in found]
    values = [shown for _, row in cells for _, _, shown in row]
    if scale is None and values:
        highest = max(values)
        scale = Scale(min(max(min(values), highest * WIDEST), highest / 1.01), highest, 10)
    kinds = [kind for kind, _, _ in found]
    groups = [(kind, kinds.count(kind)) for kind in dict.fromkeys(kinds)]
    return heat_map(Map(title, what, cells, groups, note, scale or Scale()), STEP, steps_of(run))


def similarity(run: Run) -> str:
    title = "Similarity to the old basis, by layer and step"
    note = "The colour shows the similarity found at a refresh, until the next one. At 1 the subspace stands still."
    return _by_layer(run, run.refreshes, lambda row: number(row, "similarity"), title, "similarity", note, Scale())


def energy_by_layer(run: Run) -> str:
    title = "Gradient energy in the new basis, by layer and step"
    note = "The colour shows the share of ‖G‖² that a refresh captured, until the next one. At 1 nothing is lost."
    return _by_layer(run, run.refreshes, lambda row: number(row, "energy"), title, "energy", note, Scale())


def update_size_by_layer(run: Run) -> str:
    title = "Size of an update, by layer and step"
    note = "The colour shows ‖ΔW‖ / ‖W‖ of a step that was looked at, until the next one, on a logarithmic scale."
    return _by_layer(run, run.updates, lambda row: relative(row) or None, title, "‖ΔW‖ / ‖W‖", note, None)


def momentum_error_by_layer(run: Run) -> str:
    title = "Error of the stored momentum, by layer and step"
    note = (
        "The colour shows 1 minus the cosine between the update and the one that the momentum as it is stored would "
        "give, on a logarithmic scale. At 0 the code loses nothing."
    )
    return _by_layer(run, run.updates, momentum_error, title, "error", note, None)
