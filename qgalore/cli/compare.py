"""``qgalore compare``: variants of one configuration, trained on the same tokens and compared."""

import argparse
import re
import sys
from pathlib import Path

from . import arguments as kinds
from . import door

EXAMPLES = """
  %(prog)s --config quickstart --vary method=qgalore,adamw8bit --vary train.lr=0.004,0.008
  %(prog)s --config quickstart --variant 'slow: lowrank.update_proj_gap=100' --variant 'base:' --seeds 0,1
"""
# The package of this very program, wherever it lies, and in a working folder of the user's.
_FIND = "import sys; sys.path.insert(0, sys.argv.pop(1)); import qgalore; sys.path.pop(0)"
_TRAIN = f"{_FIND}; from qgalore.cli.train import main; sys.exit(main(sys.argv[1:]))"
TRAIN = (sys.executable, "-c", _TRAIN, str(Path(__file__).resolve().parents[2]))


def parse(arguments: list[str], program: str) -> argparse.Namespace:
    parser = kinds.parser(program, "Train variants of a configuration and compare them.", EXAMPLES)
    add = parser.add_argument
    add("--config", required=True, metavar="NAME|PATH", help="the base configuration, as for qgalore train")
    add("--vary", action="append", default=[], metavar="KEY=A,B", help="every combination; train.lr: rates to tune")
    add("--variant", action="append", default=[], metavar="'NAME: KEY=VALUE …'", help="a variant by name (repeatable)")
    add("--variants", type=Path, metavar="FILE", help="a YAML file that maps names to overrides")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="an override for all runs (repeatable)")
    add("--seeds", default="0", metavar="A,B", help="seeds; the first one tunes (default 0)")
    add("--seeds-at", choices=("best", "all"), default="best", help="where the other seeds run (default: best rate)")
    add("--out", type=Path, default=Path("runs/compare"), metavar="DIR", help="for the runs and tables")
    add(
        "--jobs",
        type=kinds.whole(1, 1024),
        default=1,
        metavar="N",
        help="runs at a time (default 1: only then do speeds compare)",
    )
    return parser.parse_args(arguments)


def variants_of(options: argparse.Namespace) -> list:
    from ..comparison import grid

    keys, rates = grid.varied(options.vary)
    found = [grid.one_variant(text, rates) for text in options.variant]
    if options.variants:
        found += grid.variants_of_file(options.variants, rates)
    if keys or not found:
        found += grid.product(keys, rates)
    return grid.check(found)


def compare(options: argparse.Namespace) -> int:
    from .. import config
    from ..comparison import grid, outcome, runner
    from ..errors import ConfigError

    variants = variants_of(options)
    words = grid.read_values(options.seeds, "--seeds")
    if not all(re.fullmatch("[0-9]{1,18}", word) for word in words):
        raise ConfigError(f"--seeds is {options.seeds}; it must be whole numbers from 0, such as 0,1")
    seeds = [int(word) for word in words]
    for variant in variants:  # a misspelt key is told before the first run, not after an hour
        for rate in variant.rates or (None,):
            config.load(options.config, [*options.set, *grid.Job(variant, rate, seeds[0]).overrides])
    first = grid.first_jobs(variants, seeds, options.seeds_at)
    later = sum(len(v.rates) > 1 for v in variants) * (len(seeds) - 1) if options.seeds_at == "best" else 0
    work = runner.Runner(
        config=config.find(options.config),
        shared=tuple(options.set),
        out=options.out,
        train=TRAIN,
        workers=options.jobs,
        expected=len(first) + later,
        say=lambda line: print(line, flush=True),
    )
    print(f"{len(variants)} variants, {work.expected} runs; everything is in {options.out}", flush=True)
    work.run(first)
    results = [one for job in first if (one := outcome.read_result(job, work.folder(job)))]
    more = []
    if later:
        tuned = [v for v in variants if len(v.rates) > 1 and any(one.job.variant == v for one in results)]
        more = [grid.Job(v, outcome.best_rate(v, results, seeds[0]), seed) for v in tuned for seed in seeds[1:]]
        work.expected -= later - len(more)  # a variant without a single finished run has no best rate
        work.run(more)
        results += [one for job in more if (one := outcome.read_result(job, work.folder(job)))]
    write(options, outcome.summarise(variants, results, seeds), results, work.failures)
    return 1 if work.failures else 0


def write(options: argparse.Namespace, summaries: list, results: list, failures: list) -> None:
    from ..comparison import tables
    from ..files.atomic import write_report

    title = f"Comparison: {Path(options.config).stem}"
    print(f"\n{tables.text(summaries, failures)}\n")
    write_report(options.out / "comparison.md", tables.markdown(summaries, failures))
    write_report(options.out / "comparison.csv", tables.csv_rows(results))
    write_report(options.out / "comparison.html", tables.page(summaries, failures, title))
    print(f"written: {options.out}/comparison.md, comparison.csv, comparison.html")


main = door.program("qgalore compare", parse, compare)
