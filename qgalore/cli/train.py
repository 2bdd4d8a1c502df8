"""``qgalore train``: a run, from its configuration to its exports."""

import argparse
import os
import sys

from . import arguments as kinds
from . import door, plan

EXAMPLES = """
  %(prog)s --config quickstart.yaml
  %(prog)s --config quickstart.yaml --resume auto train.max_steps=600
"""
INTERRUPTED = "interrupted; checkpoints saved so far are intact, go on with --resume auto"


def parse(arguments: list[str], program: str) -> argparse.Namespace:
    parser = kinds.parser(program, "Train a language model in little memory.", EXAMPLES)
    plan.add_configuration(parser)
    parser.add_argument("--plan", action="store_true", help="print what the run will need in memory, and stop")
    plan.add_world_size(parser)
    parser.add_argument(
        "--preview", type=kinds.whole(1), metavar="N", help="print N training rows, what is learned of them, and stop"
    )
    parser.add_argument("--resume", metavar="auto|PATH", help="continue from the run's newest checkpoint, or from PATH")
    options = parser.parse_intermixed_args(arguments)
    if options.world_size > 1 and not options.plan:
        parser.error("--world-size goes with --plan only; torchrun --nproc_per_node N trains in N processes")
    plan.check_world_size(parser, options)
    if options.preview and (options.plan or options.resume):
        parser.error("--preview prints rows and stops; leave out --plan and --resume")
    return options


def run(options: argparse.Namespace) -> None:
    if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        # against fragmentation: refreshes and blocks of the vocabulary ask for memory in many sizes
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if options.plan:
        plan.run(options)
        return
    # Imported here so that --help and a misspelt option answer at once.
    from .. import config
    from ..parallel import job
    from ..training import assemble
    from ..training.determinism import deterministic

    settings = config.load(options.config, options.overrides)
    if options.preview:
        with job(settings.device) as team:
            if team.leads:
                assemble.preview(settings, options.preview)
        return
    with deterministic(settings.run.deterministic), job(settings.device) as team:
        with team.together("the end of training"):
            made = assemble.build(settings, options.resume, team)
            with made.loop.course.tracking:
                result = made.loop.run()
        if team.leads:
            assemble.finish(made, made.loop.position.best_step)
    if team.leads:
        said = assemble.ending(settings, result, made.loop.position, made.folder)
        print(f"done: {said}; everything is in {made.folder}")


main = door.program("qgalore train", parse, run, INTERRUPTED)
