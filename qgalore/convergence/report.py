"""One self-contained HTML page for one or several runs: no script, no font, no address of another file."""

import os
from contextlib import suppress
from html import escape
from pathlib import Path

from ..errors import ConfigError
from . import charts, plot, table
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


def write_text(path: Path, text: str) -> None:
    """Replace the file ``path`` in one move, so that a browser never reads half a page and a full disk leaves the old
    one. A device or a pipe, such as ``/dev/null``, is written to and stays. Raises :class:`ConfigError`."""
    path = Path(os.path.realpath(path))
    special = path.exists() and not path.is_file()
    fresh = path if special else path.with_name(f".{path.name}.tmp")
    try:
        fresh.write_text(text, encoding="utf-8")
        if not special:
            fresh.replace(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error}; choose another file") from error
    finally:
        if not special:
            with suppress(OSError):
                fresh.unlink(missing_ok=True)
