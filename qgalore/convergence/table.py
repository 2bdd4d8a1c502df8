"""Summaries as text of at most ``WIDTH`` columns. A value that is not known shows as "-"."""

import textwrap
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import counted, printable
from .summary import LayerSummary, RunSummary, by_kind, together

WIDTH = 100
LAYER_COLUMNS = (
    ("layer", -22),
    ("shape", 12),
    ("rank", 6),
    ("done", 6),
    ("skipped", 8),
    ("gap", 6),
    ("sim.", 6),
    ("energy", 7),
    ("before", 7),
    ("settled", 8),
    ("spent", 6),
    ("saved", 6),
)
RUN_COLUMNS = (
    ("run", -22),
    ("step", 14),
    ("loss", 7),
    ("held-out", 9),
    ("tok/s", 11),
    ("SVDs", 6),
    ("skipped", 8),
    ("% of time", 10),
    ("hours saved", 12),
)
LEGEND = """\
done, skipped: refreshes made, and those that fixed gaps would have added | gap: now, in steps
sim.: similarity to the basis before | energy, before: of the gradient, in the new basis and in the
old one, at the last refresh | settled: yes = similarity at the threshold, max = gap at its limit
spent, saved: time in refreshes | in a line for several layers: sums, means, and the median gap"""


def figure(value: float | None, pattern: str) -> str:
    """``value`` in a format such as ``.3f``, or "-"."""
    return "-" if value is None else format(value, pattern)


def nats(loss: float | None) -> str:
    """A loss in at most six characters: a larger one, of a run that diverged, has fewer decimals."""
    limits = {".4f": 9.99995, ".3f": 99.9995, ".1f": 9999.95}
    return figure(loss, next((pattern for pattern, limit in limits.items() if loss is None or loss < limit), ".0e"))


def duration(seconds: float | None) -> str:
    """At most five characters: ``0.04s``, ``12.3s``, ``5m12s``, ``3h05m``, ``120h``."""
    if seconds is None:
        return "-"
    if seconds < 9.995:
        return f"{seconds:.2f}s"
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    minutes = seconds / 60
    if minutes < 9.99:
        return f"{int(minutes)}m{int(seconds) % 60:02d}s"
    if minutes < 60:
        return f"{minutes:.0f}m"
    hours = seconds / 3600
    return f"{int(hours)}h{int(minutes) % 60:02d}m" if hours < 10 else f"{hours:.0f}h"


def line(cells: list[str], columns: tuple[tuple[str, int], ...]) -> str:
    """One line; a first cell that is too long loses its beginning, which tells less than its end."""
    parts = []
    for cell, (_, width) in zip(cells, columns, strict=True):
        if width < 0:
            parts.append((cell if len(cell) < -width else "…" + cell[width + 2 :]).ljust(-width))
        else:
            parts.append(cell.rjust(width))
    return "".join(parts).rstrip()


def _settled(layer: LayerSummary) -> str:
    if layer.settled is None:
        return "-"
    if layer.layers > 1:
        return f"{layer.settled}/{layer.layers}"
    return "max" if layer.at_limit else ("yes" if layer.settled else "no")


def _layer_line(label: str, layer: LayerSummary) -> str:
    cells = [
        label,
        "-" if layer.shape is None else "×".join(map(str, layer.shape)),
        figure(layer.rank, "d"),
        str(layer.done),
        figure(layer.skipped, "d"),
        figure(layer.gap, ".0f"),
        figure(layer.similarity, ".3f"),
        figure(layer.energy, ".3f"),
        figure(layer.energy_before, ".3f"),
        _settled(layer),
        duration(layer.seconds),
        duration(layer.saved_seconds),
    ]
    return line(cells, LAYER_COLUMNS)


def _indices(layer: Any) -> str:
    """What tells a layer from the others of its kind: its name without the kind."""
    return layer.name.removesuffix(layer.kind).rstrip(".").split(".", 1)[-1] or layer.name


def heading(columns: tuple[tuple[str, int], ...]) -> list[str]:
    return [line([name for name, _ in columns], columns), "-" * sum(abs(width) for _, width in columns)]


def grouped(groups: Mapping[str, list], kinds: bool, together: Callable, line: Callable[[str, Any], str]) -> list[str]:
    """A ``line`` for each kind of layer; unless ``kinds`` alone are wanted, one for each of its layers below it."""
    lines = []
    for kind, layers in groups.items():
        if len(layers) == 1:
            lines.append(line(layers[0].name, layers[0]))
            continue
        lines.append(line(f"{kind} ({len(layers)})", together(kind, layers)))
        lines += [] if kinds else [line(f"  {_indices(layer)}", layer) for layer in layers]
    return lines


def layer_lines(summary: RunSummary, kinds: bool = False) -> list[str]:
    """The lines of one run, for each layer or for each kind of layer."""
    return grouped(by_kind(summary.layers), kinds, together, _layer_line)


def state(summary: RunSummary) -> str:
    run = summary.run
    of = "" if run.max_steps is None else f" of {run.max_steps}"
    parts = [f"{run.name}: step {run.step}{of}{'' if run.finished else ', not finished'}"]
    sets = ", ".join(f"{name} {figure(value, '.4f')}" for name, value in summary.held_out_sets.items())
    held_out = figure(summary.held_out, ".4f") + (f" ({sets})" if sets else "")
    parts.append(f"loss {figure(summary.loss, '.4f')}, held-out {held_out}")
    parts.append(f"{figure(summary.tokens_per_second, ',.0f')} tokens/s")
    if summary.share is not None:
        parts.append(f"refreshes {summary.share:.1%} of step time")
    lines = textwrap.fill(" | ".join(parts), WIDTH)
    if summary.total is not None and summary.total.failed:
        lines += f"\n{counted(summary.total.failed, 'refresh', 'refreshes')} found no basis and kept the old one"
    if run.unreadable:
        lines += f"\n{counted(run.unreadable, 'damaged line was', 'damaged lines were')} left out"
    return lines


def run_table(summary: RunSummary, lines: list[str]) -> str:
    """State and table (``lines`` from :func:`layer_lines`) of one run."""
    if summary.total is None:
        method = summary.run.config.get("method")
        why = f" (method {printable(method)})" if isinstance(method, str) else ""
        return f"{state(summary)}\nno refresh is recorded{why}: there is no subspace, or the first step is not over"
    total = _layer_line(f"total ({summary.total.layers})", summary.total)
    rule = heading(LAYER_COLUMNS)[1]
    return "\n".join([state(summary), "", *heading(LAYER_COLUMNS), *lines, rule, total])


def runs_table(summaries: list[RunSummary]) -> str:
    lines = heading(RUN_COLUMNS)
    for summary in summaries:
        run, total = summary.run, summary.total
        saved = None if total is None or total.saved_seconds is None else total.saved_seconds / 3600
        cells = [
            run.name,
            f"{run.step}/{'-' if run.max_steps is None else run.max_steps}",
            nats(summary.loss),
            nats(summary.held_out),
            figure(summary.tokens_per_second, ",.0f"),
            figure(None if total is None else total.done, "d"),
            figure(None if total is None else total.skipped, "d"),
            figure(None if summary.share is None else 100 * summary.share, ".1f"),
            figure(saved, ".4f" if saved is not None and saved < 0.1 else ".2f"),
        ]
        lines.append(line(cells, RUN_COLUMNS))
    return "\n".join(lines)
