"""``qgalore convergence``: how training and its subspaces converge, from the records of runs."""

import argparse
import sys
import time
from contextlib import suppress
from pathlib import Path

from . import arguments as kinds
from . import door

EXAMPLES = """
  %(prog)s runs/quickstart --html report.html
  %(prog)s runs/quickstart runs/adamw --kinds --follow
"""

INTERVAL = 5  # seconds between two looks of --follow


def parse(arguments: list[str], program: str) -> argparse.Namespace:
    parser = kinds.parser(program, "Show the records of runs: tables, a report, CSV.", EXAMPLES)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, such as runs/quickstart")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a report with plots, one self-contained file")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write every refresh of every layer as a table")
    parser.add_argument("--tensorboard", type=Path, metavar="DIR", help="write scalars for TensorBoard under DIR")
    for package in ("trackio", "wandb"):
        parser.add_argument(
            f"--{package}", metavar="PROJECT", help=f"send the scalars to {package}, if it is installed"
        )
    parser.add_argument("--kinds", action="store_true", help="a line for each kind of layer, not for each layer")
    parser.add_argument("--follow", action="store_true", help="go on until the runs end or Ctrl-C")
    return parser.parse_args(arguments)


def look(options: argparse.Namespace) -> bool:
    """Read, print and write once. Returns whether all runs have ended."""
    from ..convergence import csv_rows, records, report, summary, table, updates
    from ..files.atomic import write_report

    runs = [records.read_run(folder) for folder in options.runs]
    if not options.follow:
        runs = [records.require_rows(run) for run in runs]
    summaries = [summary.summarise(run) for run in records.distinct(runs)]
    finished = all(run.finished for run in runs)
    lines = table.kind_lines if options.kinds else table.layer_lines
    shown = [table.run_table(one, lines(one)) for one in summaries]
    if any(one.total for one in summaries):
        shown.append(table.LEGEND)
    shown += [text for one in summaries if (text := updates.table(one.run, options.kinds))]
    if len(summaries) > 1:
        shown.append(table.runs_table(summaries))
    if options.follow and sys.stdout.isatty():
        print("\033[2J\033[H", end="")  # clear the screen
    print("\n\n".join(shown), flush=True)
    if options.html:
        write_report(options.html, report.page(summaries, INTERVAL if options.follow and not finished else None))
    if options.csv:
        write_report(options.csv, csv_rows.refresh_rows([one.run for one in summaries]))
    return finished


def mirror(options: argparse.Namespace) -> None:
    from ..convergence import records, tensorboard, trackers

    for run in records.distinct([records.read_run(folder) for folder in options.runs]):
        if options.tensorboard:
            count = tensorboard.write(run, options.tensorboard)
            print(f"{count:,} scalars of {run.name} are in {options.tensorboard}")
        for package in trackers.PACKAGES:
            if project := getattr(options, package):
                print(f"{trackers.send(run, package, project):,} scalars of {run.name} went to {package}: {project}")


def show(options: argparse.Namespace) -> None:
    with suppress(KeyboardInterrupt):  # the ordinary end of --follow
        while not look(options) and options.follow:
            time.sleep(INTERVAL)
        mirror(options)


def main(arguments: list[str], program: str = "qgalore convergence") -> int:
    options = parse(arguments, program)
    return door.leave(lambda: show(options))
