"""The page of a folder of runs: a table with a line for each, their losses, and links to the pages of the runs."""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from urllib.parse import quote

from . import charts, report
from .records import Run, held_out, number
from .summary import RunSummary
from .table import figure
from .tensorboard import inside

COLUMNS = (
    "run", "state", "method", "rule", "steps", "train loss", "held-out loss", "best", "tokens/s", "GiB",
)  # fmt: skip


# Methods that step whole gradients or adapters, so that `lowrank.rule` says nothing about them.
WITHOUT_RULE = ("lora", "adamw", "adamw8bit")


def state(run: Run, training: bool | None) -> str:
    """What became of a run. ``training``: whether a process holds its lock, None where that cannot be known."""
    if run.finished:
        return "finished"
    if training:
        return "running"
    if not run.train:
        return "no step recorded"
    if "skipped" in run.train[-1]:
        return f"failed at step {run.step}: {run.train[-1]['skipped']}"
    return f"stopped at step {run.step}" if training is False else "not finished"


def best(run: Run) -> tuple[float | None, int | None]:
    """The lowest held-out loss and its step, of all sets together where that was recorded."""
    sets = held_out(run)
    points = sets.get("") or next(iter(sets.values()), [])
    return min(((loss, step) for step, loss in points), default=(None, None))


def file_names(summaries: list[RunSummary]) -> list[str]:
    """A file for each run's page; names that only differ in signs which a file cannot have get a number."""
    found: list[str] = []
    for summary in summaries:
        name = inside(summary.run.name)
        copies = sum(other == name or other.startswith(f"{name}~") for other in found)
        found.append(f"{name}~{copies + 1}" if copies else name)
    return [f"{name}.html" for name in found]


def _cells(summary: RunSummary, training: bool | None) -> list[str]:
    run = summary.run
    method, rule = run.config.get("method"), run.setting("lowrank", "rule")
    memory = max((value for row in run.train if (value := number(row, "memory_bytes"))), default=None)
    loss, step = best(run)
    return [
        state(run, training),
        str(method) if isinstance(method, str) else "–",
        str(rule) if isinstance(rule, str) and method not in WITHOUT_RULE else "–",
        f"{run.step:,} of {run.max_steps:,}" if run.max_steps else f"{run.step:,}",
        figure(summary.loss, ".4f"),
        figure(summary.held_out, ".4f"),
        "-" if loss is None else f"{loss:.4f} at {step:,}",
        figure(summary.tokens_per_second, ",.0f"),
        figure(None if memory is None else memory / 2**30, ".2f"),
    ]


def page(
    summaries: list[RunSummary],
    title: str,
    training: Mapping[Path, bool | None],
    links: list[str] | None = None,
    reload_seconds: int | None = None,
) -> str:
    """The page as text. ``training``: by folder, whether a process trains the run; ``links``: where the page of each
    run lies, relative to this one."""
    rows = ["<tr>" + "".join(f"<th>{name}</th>" for name in COLUMNS) + "</tr>"]
    for i, summary in enumerate(summaries):
        name = escape(summary.run.name)
        first = f'<a href="{escape(quote(links[i]))}">{name}</a>' if links else name
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in _cells(summary, training.get(summary.run.folder)))
        rows.append(f"<tr><td>{first}</td>{cells}</tr>")
    runs = [summary.run for summary in summaries]
    table = f'<div class="wide"><table>{"".join(rows)}</table></div>'
    legend = "<p>best: the lowest held-out loss and its step | GiB: the highest memory that a step recorded</p>"
    body = f"<p>{report.HINT}</p>{table}{legend}{charts.losses_of(runs)}{charts.train_losses_of(runs)}"
    return report.document(title, body, reload_seconds)
