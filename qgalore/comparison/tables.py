"""A comparison as text, Markdown, CSV and one self-contained page."""

import csv
import io
import math
from html import escape

from ..convergence import plot, report
from .outcome import Result, Summary, front
from .runner import Failure

HEAD = (
    "variant", "best lr", "held-out loss", "to the best", "seeds", "perplexity", "SVDs", "weights + optimizer",
    "planned peak", "tokens/s",
)  # fmt: skip
MIB = 1 << 20


def _size(value: int | None) -> str:
    return "-" if value is None else f"{value / MIB:,.2f} MiB"


def _difference(summary: Summary, best: Summary) -> str:
    """That of the losses, with its standard error where several seeds have ended in both."""
    if summary is best or (found := summary.beyond(best)) is None:
        return "-"
    several = len(summary.losses.keys() & best.losses.keys()) > 1
    return f"{found[0]:+.4f}" + (f" ± {found[1]:.4f}" if several else "")


def cells(summary: Summary, best: Summary) -> list[str]:
    """A line of the table, as texts in the order of ``HEAD``."""
    several = len(summary.losses) > 1
    perplexity = math.exp(summary.loss)
    return [
        summary.variant.name,
        summary.rate or "as configured",
        f"{summary.loss:.4f}" + (f" ± {summary.spread:.4f}" if several else ""),
        _difference(summary, best),
        str(len(summary.losses)),
        f"{perplexity:.2f}" + (f" ± {perplexity * summary.spread:.2f}" if several else ""),
        f"{summary.refreshes:,.0f}",
        _size(summary.kept),
        _size(summary.peak),
        f"{summary.speed:,.0f}" + (f" ± {summary.speed_spread:,.0f}" if several else ""),
    ]


def _lines(summaries: list[Summary]) -> list[list[str]]:
    return [cells(summary, summaries[0]) for summary in summaries]


def _notes(summaries: list[Summary], failures: list[Failure]) -> list[str]:
    lines = [f"{s.variant.name}: {note}" for s in summaries for note in s.notes]
    for summary in summaries:
        if len(summary.tried) > 1:
            tried = ", ".join(
                f"{rate} → {'failed' if math.isnan(loss) else f'{loss:.4f}'}" for rate, loss in summary.tried.items()
            )
            lines.append(f"{summary.variant.name}: held-out loss by rate, first seed: {tried}")
    return lines + [f"failed: {one.job.name} (exit code {one.code}): {one.line}" for one in failures]


def text(summaries: list[Summary], failures: list[Failure]) -> str:
    """For a terminal. ``±``: the standard deviation over seeds, a perplexity's to first order from the loss's; but of a
    difference ("to the best", seed by seed) the standard error of its mean."""
    rows = [list(HEAD), *_lines(summaries)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join([*lines, "", *_notes(summaries, failures)]).rstrip()


def markdown(summaries: list[Summary], failures: list[Failure]) -> str:
    rows = [HEAD, ["---"] * len(HEAD), *_lines(summaries)]
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    return table + "\n\n" + "".join(f"- {line}\n" for line in _notes(summaries, failures))


def csv_rows(results: list[Result]) -> str:
    sheet = io.StringIO()
    writer = csv.writer(sheet, lineterminator="\n")
    head = ("variant", "overrides", "lr", "seed", "eval_loss", "eval_perplexity", "steps", "tokens")
    writer.writerow([*head, "tokens_per_second", "refreshes", "weights_and_optimizer_bytes", "planned_peak_bytes"])
    for one in results:
        job = one.job
        named = (job.variant.name, " ".join(job.variant.overrides), job.rate, job.seed)
        ended = (one.loss, math.exp(one.loss), one.steps, one.tokens, one.speed)
        writer.writerow([*named, *ended, one.refreshes, one.kept, one.peak])
    return sheet.getvalue()


def _figure(summaries: list[Summary], title: str, of) -> str:
    known = [summary for summary in summaries if of(summary) is not None]
    series = [
        plot.Series(summary.variant.name, [(of(summary) / MIB, summary.loss)], number, "dots")
        for number, summary in enumerate(known)
    ]
    series += [  # a bar of one standard deviation either way
        plot.Series(s.variant.name, [(of(s) / MIB, s.loss + sign * s.spread) for sign in (-1, 1)], number, "faint")
        for number, s in enumerate(known)
        if s.spread
    ]
    best = front(known, of)
    line = [plot.Series("not beaten in both", [(of(s) / MIB, s.loss) for s in best], 7, "dashed")] if best else []
    return plot.lines(title, line + series, "MiB", "held-out loss, nats")


def page(summaries: list[Summary], failures: list[Failure], title: str) -> str:
    """The table and the plots of loss against memory, as one HTML file that needs no other."""
    drawn = [
        _figure(summaries, "Held-out loss against weights and optimizer", lambda s: s.kept),
        _figure(summaries, "Held-out loss against the planned peak", lambda s: s.peak),
    ]
    return report.document(title, f"<pre>{escape(text(summaries, failures))}</pre>{''.join(drawn)}")
