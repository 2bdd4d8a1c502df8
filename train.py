"""Train a language model in little memory: ``python train.py --config quickstart.yaml [key=value …]``, on several
cards or machines ``torchrun --nproc_per_node N train.py …``."""

import argparse
import os
import sys

from qgalore.cli import arguments as kinds
from qgalore.cli import door

INTERRUPTED = "interrupted; checkpoints saved so far are intact, go on with --resume auto"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a language model in little memory.")
    parser.add_argument("--config", required=True, metavar="NAME|PATH", help="a YAML file, here or in configs/")
    parser.add_argument("--plan", action="store_true", help="print what the run will need in memory, and stop")
    processes = kinds.whole(1, 2**16)
    parser.add_argument("--world-size", type=processes, default=1, metavar="N", help="processes that --plan plans for")
    parser.add_argument("--resume", metavar="auto|PATH", help="continue from the run's newest checkpoint, or from PATH")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.lr=0.001 run.name=second")
    options = parser.parse_intermixed_args(arguments)
    if options.world_size > 1 and not options.plan:
        parser.error("--world-size goes with --plan only; torchrun --nproc_per_node N trains in N processes")
    return options


def run(options: argparse.Namespace) -> None:
    # Imported here so that --help and a misspelt option answer at once.
    from qgalore import config
    from qgalore.parallel import job
    from qgalore.training import assemble

    settings = config.load(options.config, options.overrides)
    if options.plan:
        assemble.plan(settings, options.world_size)
        return
    with job(settings.device) as team:
        with team.together("the end of training"):
            made = assemble.build(settings, options.resume, team)
            result = made.loop.run()
        if team.leads:
            assemble.finish(made, made.loop.position.best_step)
    print(f"done: {assemble.ending(settings, result, made.loop.position)}; everything is in {made.folder}")


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        # against fragmentation: refreshes and blocks of the vocabulary ask for memory in many sizes
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    return door.leave(lambda: run(options), INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
