"""One self-contained HTML page for one or several runs: no script, no font, no address of another file."""

from html import escape

from . import charts, plot, table, updates
from .summary import RunSummary

STYLE = (
    "body{font:15px/1.45 sans-serif;max-width:900px;margin:2em auto;padding:0 1em;color:var(--ink);"
    "background:var(--page)}figure{margin:2em 0}h3{font-size:1em;margin:.2em 0}p{margin:.2em 0}"
    "pre{overflow-x:auto;font:12px/1.35 monospace}.key{margin-right:1.2em;white-space:nowrap}"
    ".key i{display:inline-block;width:1em;height:.7em;margin-right:.4em}.legend{font-size:.85em}"
)


def page(summaries: list[RunSummary], reload_seconds: int | None = None) -> str:
    """The page as text; ``reload_seconds`` makes a browser read it again, for a run in progress."""
    title = escape("Convergence: " + ", ".join(summary.run.name for summary in summaries))
    parts = [f"<h1>{title}</h1>"]
    if len(summaries) > 1:
        parts.append(f"<pre>{escape(table.runs_table(summaries))}</pre>")
        parts.append(charts.losses_of([summary.run for summary in summaries]))
    for summary in summaries:
        parts.append(f"<h2>{escape(summary.run.name)}</h2>")
        parts.append(f"<pre>{escape(table.run_table(summary, table.layer_lines(summary)))}</pre>")
        parts += [f"<pre>{escape(table.LEGEND)}</pre>"] if summary.total else []
        if shown := updates.table(summary.run, kinds=False):
            parts.append(f"<pre>{escape(shown)}</pre>")
            parts += [drawn for chart in charts.OF_UPDATES if (drawn := chart(summary.run))]
        figures = [chart(summary.run) for chart in charts.ALL]
        parts += [drawn for drawn in figures if drawn]
        missing = [
            chart.__name__.replace("_", " ") for chart, drawn in zip(charts.ALL, figures, strict=True) if not drawn
        ]
        if missing:
            parts.append(f"<p>Not recorded in this run: {escape(', '.join(missing))}.</p>")
    reload = f'<meta http-equiv="refresh" content="{reload_seconds}"/>' if reload_seconds else ""
    head = f'<head><meta charset="utf-8"/>{reload}<title>{title}</title><style>{plot.STYLE}{STYLE}</style></head>'
    return f'<!DOCTYPE html>\n<html lang="en">{head}<body>{"".join(parts)}</body></html>\n'
