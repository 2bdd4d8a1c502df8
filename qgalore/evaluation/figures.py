"""Two models' figures side by side: what changed, and how sure that is."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """One number about a model. ``items``: how many questions, samples or tokens it is a mean over; ``values``: that
    of each of them, if known; ``error``: one standard error, if known; ``digits``: how many to show; ``over``: tells
    what the items are, if models may differ in that."""

    name: str
    value: float
    items: int
    error: float | None = None
    values: tuple[float, ...] | None = None
    digits: int = 3
    over: str = ""

    def __str__(self) -> str:
        return shown(self.value, self.error, self.digits)


@dataclass(frozen=True)
class Difference:
    """``after`` minus ``before`` of one figure; ``value`` is None where the two are not over the same items, and
    ``error`` where it is not known."""

    before: Figure
    after: Figure
    value: float | None
    error: float | None

    def __str__(self) -> str:
        return "–" if self.value is None else shown(self.value, self.error, self.before.digits, sign="+")


def shown(value: float, error: float | None, digits: int, sign: str = "") -> str:
    return f"{value:{sign}.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def difference(before: Figure, after: Figure) -> Difference:
    """What changed from ``before`` to ``after``. Where the value of every item is known the standard error is that of
    the mean of their differences: items that both models find hard cancel. Otherwise it is that of two independent
    figures."""
    if (before.items, before.over) != (after.items, after.over):
        return Difference(before, after, None, None)
    error = None
    if before.values is not None and after.values is not None and len(before.values) == len(after.values) > 1:
        apart = [b - a for a, b in zip(before.values, after.values, strict=True)]
        error = statistics.stdev(apart) / math.sqrt(len(apart))
    elif before.error is not None and after.error is not None:
        error = math.hypot(before.error, after.error)
    return Difference(before, after, after.value - before.value, error)


def table(found: Sequence[Difference]) -> list[str]:
    """Lines of a table with a row for each of ``found``, and what there is to say about it below."""
    rows = [("", "before", "after", "difference")]
    rows += [(one.before.name, str(one.before), str(one.after), str(one)) for one in found]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if any(one.error is not None for one in found):
        lines.append("± is one standard error")
    lines += [
        f"note: {one.before.name} is over {one.before.items:,} tokens before and {one.after.items:,} after, and not "
        "the same ones, so the two cannot be compared"
        for one in found
        if one.value is None
    ]
    return lines
