"""``qgalore convergence``: how training and its subspaces converge, from the records of runs."""

import argparse
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import counted
from . import arguments as kinds
from . import door

if TYPE_CHECKING:
    from ..convergence.summary import RunSummary

EXAMPLES = """
  %(prog)s runs/quickstart --html report.html --kinds --follow
  %(prog)s runs --html index.html
"""

INTERVAL = 5  # seconds between two looks of --follow


def parse(arguments: list[str], program: str) -> argparse.Namespace:
    parser = kinds.parser(program, "Show the records of runs: tables, a report, CSV.", EXAMPLES)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or a folder of runs")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots, one self-contained file")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write every refresh of every layer as a table")
    parser.add_argument("--tensorboard", type=Path, metavar="DIR", help="write scalars for TensorBoard under DIR")
    for package in ("trackio", "wandb"):
        parser.add_argument(
            f"--{package}", metavar="PROJECT", help=f"send the scalars to {package}, if it is installed"
        )
    parser.add_argument("--kinds", action="store_true", help="a line for each kind of layer, not for each layer")
    parser.add_argument("--follow", action="store_true", help="go on until the runs end or Ctrl-C")
    return parser.parse_args(arguments)


def folders(paths: list[Path]) -> tuple[list[Path], bool]:
    """The run folders that ``paths`` name, and whether one of them is a folder of runs."""
    from ..convergence import records

    found = [records.find_runs(path) if path.is_dir() and not records.is_run(path) else [path] for path in paths]
    several = any(runs and runs != [path] for path, runs in zip(paths, found, strict=True))
    return [run for path, runs in zip(paths, found, strict=True) for run in runs or [path]], several


def look(options: argparse.Namespace) -> bool:
    """Read, print and write once. Returns whether all runs have ended."""
    from ..convergence import csv_rows, records, summary, table
    from ..files.atomic import write_report

    found, several = folders(options.runs)
    runs = [records.read_run(folder) for folder in found]
    if not options.follow and not several:
        runs = [records.require_rows(run) for run in runs]
    summaries = [summary.summarise(run) for run in records.distinct(runs)]
    finished = all(run.finished for run in runs)
    text = table.runs_table(summaries) if several else _tables(summaries, options.kinds)
    if options.follow and sys.stdout.isatty():
        print("\033[2J\033[H", end="")  # clear the screen
    print(text, flush=True)
    if options.html:
        write = _write_index if several else _write_page
        write(options, summaries, INTERVAL if options.follow and not finished else None)
    if options.csv:
        write_report(options.csv, csv_rows.refresh_rows([one.run for one in summaries]))
    return finished


def _tables(summaries: list["RunSummary"], kinds: bool) -> str:
    from ..convergence import table, updates

    shown = [table.run_table(one, table.layer_lines(one, kinds)) for one in summaries]
    if any(one.total for one in summaries):
        shown.append(table.LEGEND)
    shown += [text for one in summaries if (text := updates.table(one.run, kinds))]
    if len(summaries) > 1:
        shown.append(table.runs_table(summaries))
    return "\n\n".join(shown)


def _write_page(options: argparse.Namespace, summaries: list["RunSummary"], reload: int | None) -> None:
    from ..convergence import report
    from ..files.atomic import write_report

    write_report(options.html, report.page(summaries, reload))


def _write_index(options: argparse.Namespace, summaries: list["RunSummary"], reload: int | None) -> None:
    """The page of a folder of runs, and beside it a folder with the page of each run."""
    from ..convergence import index, report
    from ..files.atomic import write_report
    from ..training import run_lock

    pages = options.html.with_name(f"{options.html.stem}_runs")
    names = index.file_names(summaries)
    training = {one.run.folder: run_lock.is_held(one.run.folder) for one in summaries}
    title = "Runs in " + ", ".join(map(str, options.runs))
    if options.html.exists() and not options.html.is_file():
        print(f"{options.html} is not a file, so it gets the table of the runs and no page for each run is written")
        write_report(options.html, index.page(summaries, title, training, None, reload))
        return
    pages.mkdir(exist_ok=True)
    for summary, name in zip(summaries, names, strict=True):
        running = reload if not summary.run.finished else None
        write_report(pages / name, report.page([summary], running, f"../{options.html.name}"))
    links = [f"{pages.name}/{name}" for name in names]
    write_report(options.html, index.page(summaries, title, training, links, reload))
    if not options.follow:
        print(f"\n{options.html} links to {counted(len(names), 'page')} in {pages}")


def mirror(options: argparse.Namespace) -> None:
    from ..convergence import records, tensorboard, trackers

    for run in records.distinct([records.read_run(folder) for folder in folders(options.runs)[0]]):
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


main = door.program("qgalore convergence", parse, show)
