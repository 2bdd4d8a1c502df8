"""The page of one or several runs: one HTML file with its style, its script and its values, and no address of another.
The plots are drawn here. The script adds what the pointer is on, and legends that can be switched."""

from functools import cache
from html import escape
from pathlib import Path
from urllib.parse import quote

from . import charts, maps, plot, table, updates
from .summary import RunSummary

STYLE = (
    "body{font:15px/1.45 sans-serif;max-width:900px;margin:2em auto;padding:0 1em;color:var(--ink);"
    "background:var(--page)}figure{margin:2em 0}figure p{font-size:.85em}"
    "h3{font-size:1em;margin:.2em 0}p{margin:.2em 0}"
    "pre{overflow-x:auto;font:12px/1.35 monospace}.shade{margin-right:1.2em}"
    ".legend i{display:inline-block;width:1em;height:.7em;margin-right:.4em}"
    ".broken{background-image:repeating-linear-gradient(90deg,transparent 0 5px,var(--page) 5px 7px)}"
    ".key{font:inherit;color:inherit;background:none;border:0;padding:0;margin-right:1.2em;cursor:pointer}"
    ".key[aria-pressed=false]{opacity:.45;text-decoration:line-through}"
    ".key[aria-pressed=false] em{display:none}"
    ".key em{font-style:normal;font-weight:bold;font-variant-numeric:tabular-nums}"
    "output{display:block;min-height:1.5em;font-size:.85em}table{border-collapse:collapse;font-size:.9em}"
    "td,th{padding:.2em .5em;text-align:right;border-bottom:1px solid var(--rule)}"
    ":is(td,th):nth-child(-n+2){text-align:left}td{white-space:nowrap}.wide{overflow-x:auto}a{color:inherit}"
)
HINT = (
    "Point at a plot to read the layer, the step and the value, and the values of the same step in the other plots. "
    "A click holds the step. A click on a name switches its line, and a double click shows it alone."
)
FIGURES = (
    charts.loss, maps.similarity, charts.gaps, charts.ranks, charts.energy, maps.energy_by_layer, charts.angles,
    charts.spectrum, charts.int8, charts.moments, charts.throughput, charts.refresh_share,
)  # fmt: skip
OF_UPDATES = (
    charts.update_sizes, maps.update_size_by_layer, charts.stored_momentum, maps.momentum_error_by_layer,
)  # fmt: skip


@cache
def _script() -> str:
    return Path(__file__).with_name("page.js").read_text(encoding="utf-8")


def document(title: str, body: str, reload_seconds: int | None = None) -> str:
    """A whole page around ``body`` (HTML); ``reload_seconds`` makes a browser read it again, for a run in progress."""
    reload = f'<meta http-equiv="refresh" content="{reload_seconds}"/>' if reload_seconds else ""
    head = f'<meta charset="utf-8"/>{reload}<title>{escape(title)}</title><style>{plot.STYLE}{STYLE}</style>'
    script = f"<script>//<![CDATA[\n{_script()}//]]></script>"  # XML reads a section, HTML two comments
    whole = f'<html lang="en"><head>{head}</head><body><h1>{escape(title)}</h1>{body}{script}</body></html>'
    return f"<!DOCTYPE html>\n{whole}\n"


def section(summary: RunSummary) -> str:
    run = summary.run
    parts = [f"<pre>{escape(table.run_table(summary, table.layer_lines(summary)))}</pre>"]
    parts += [f"<pre>{escape(table.LEGEND)}</pre>"] if summary.total else []
    if shown := updates.table(run, kinds=False):
        parts.append(f"<pre>{escape(shown)}</pre>")
        parts += [chart(run) for chart in OF_UPDATES]
    drawn = [chart(run) for chart in FIGURES]
    missing = [chart.__name__.replace("_", " ") for chart, text in zip(FIGURES, drawn, strict=True) if not text]
    parts += drawn
    if missing:
        parts.append(f"<p>Not recorded in this run: {escape(', '.join(missing))}.</p>")
    return "".join(parts)


def page(summaries: list[RunSummary], reload_seconds: int | None = None, index: str | None = None) -> str:
    """The page of these runs as text; ``index`` is the page to go back to, relative to this one."""
    parts = [f'<p><a href="{escape(quote(index))}">All runs</a></p>'] if index else []
    parts.append(f"<p>{HINT}</p>")
    if len(summaries) > 1:
        runs = [summary.run for summary in summaries]
        parts.append(f"<pre>{escape(table.runs_table(summaries))}</pre>")
        parts += [charts.losses_of(runs), charts.train_losses_of(runs)]
    for summary in summaries:
        parts.append(f"<h2>{escape(summary.run.name)}</h2>{section(summary)}")
    title = "Convergence: " + ", ".join(summary.run.name for summary in summaries)
    return document(title, "".join(parts), reload_seconds)
