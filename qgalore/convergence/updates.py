"""What a run's records of updates say: how far a step moves the weights, and what the code of a momentum costs."""

from dataclasses import dataclass, replace
from statistics import fmean

from .records import Row, Run, number
from .summary import by_layer, combined, kind_of, shape_of, the_same
from .table import figure, grouped, heading, line

SMALLEST_ERROR = 1e-6  # of a momentum, for a logarithmic scale; cosines in fp32 are no finer
COLUMNS = (("layer", -34), ("shape", 14), ("looks", 8), ("update", 12), ("cosine", 10), ("lowest", 10))
LEGEND = """\
looks: steps that were looked at | update: ‖ΔW‖ / ‖W‖ in the last of them
cosine: between that update and the one that the momentum as it is stored would give
lowest: cosine of all looks | in a line for several layers: the mean, and the lowest of all"""


@dataclass(frozen=True)
class Updates:
    """One layer, or several of one kind together. ``update``: ‖ΔW‖ / ‖W‖ in the last step that was looked at;
    ``cosine`` and ``lowest``: there, and over the run; None: not recorded."""

    name: str
    kind: str
    shape: tuple[int, int] | None
    looks: int
    update: float | None
    cosine: float | None
    lowest: float | None


def relative(row: Row) -> float | None:
    """‖ΔW‖ / ‖W‖ of a row; None for a weight of zeros, and for no number that can be drawn."""
    update, weight = number(row, "update_rms"), number(row, "weight_rms")
    if update is None or weight is None or update < 0 or weight <= 0:
        return None
    return number({"value": update / weight}, "value")


def momentum_error(row: Row) -> float | None:
    """1 minus the cosine that a momentum's code leaves, at least ``SMALLEST_ERROR``; None if it was not recorded."""
    cosine = number(row, "momentum_cosine")
    return None if cosine is None else max(SMALLEST_ERROR, 1 - cosine)


def _of_layer(name: str, rows: list[Row]) -> Updates:
    cosines = [value for row in rows if (value := number(row, "momentum_cosine")) is not None]
    return Updates(
        name=name,
        kind=kind_of(name),
        shape=shape_of(rows[-1]),
        looks=len(rows),
        update=relative(rows[-1]),
        cosine=cosines[-1] if cosines else None,
        lowest=min(cosines, default=None),
    )


def summarise(run: Run) -> dict[str, list[Updates]]:
    """The layers of each kind, in the order of the model; {} if nothing was recorded."""
    groups: dict[str, list[Updates]] = {}
    for name, rows in by_layer(run.updates).items():
        groups.setdefault(kind_of(name), []).append(_of_layer(name, rows))
    return groups


def together(kind: str, layers: list[Updates]) -> Updates:
    rules = {"shape": the_same, "looks": sum, "update": fmean, "cosine": fmean, "lowest": min}
    return replace(layers[0], name=f"{kind} ({len(layers)})", kind=kind, **combined(layers, rules))


def _line(label: str, layer: Updates) -> str:
    cells = [
        label,
        "-" if layer.shape is None else "×".join(map(str, layer.shape)),
        str(layer.looks),
        figure(layer.update, ".2e"),
        figure(layer.cosine, ".3f"),
        figure(layer.lowest, ".3f"),
    ]
    return line(cells, COLUMNS)


def table(run: Run, kinds: bool) -> str:
    """A line for each kind of layer, and for each layer unless ``kinds``; "" if nothing was recorded."""
    lines = grouped(summarise(run), kinds, together, _line)
    return "\n".join([*heading(COLUMNS), *lines, "", LEGEND]) if lines else ""
