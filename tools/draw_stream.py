"""Draw the timeline of a streamed step as an SVG, from a plan and given speeds, or from measured block times:

    python tools/draw_stream.py --config llama7b_8gb.yaml --tokens 4096 --out step.svg
    python tools/draw_stream.py --config llama7b_8gb.yaml --forward 0.021 --backward 0.066 --out step.svg

Three lanes show what computes and what is copied each way. The copies are those of the engine itself, run on a clock.
With ``--tokens`` a block computes 2 operations for each weight and token forward and 6 backward.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from qgalore import config as configuration
from qgalore.cli import door
from qgalore.errors import ConfigError
from qgalore.memory import timeline
from qgalore.memory.streamed import LINK, SPEED, Streamed, blocks_to_stream, on_paper
from qgalore.training import paper
from qgalore.training.model import Vocabulary

LANES = {"in": "to the device", "compute": "computation", "out": "back to the host"}
COLOURS = {"in": "#5b8fb9", "out": "#d08a3e", "forward": "#2f9c82", "loss": "#888888", "backward": "#1f6f5c"}


def planned(name: str, changes: list[str]) -> Streamed:
    """The records of a configuration's blocks. Raises :class:`ConfigError` if it streams none."""
    config = configuration.resolve(configuration.load(name, changes), "cuda", True)
    if not config.memory.streams:
        raise ConfigError(f"memory.stream is {config.memory.stream}; set memory.stream=weights or all")
    model, optimizer = paper.on_paper(config, Vocabulary(1, None, None))
    state = config.memory.stream == "all"
    return on_paper(model, blocks_to_stream(model), optimizer.tensors, config.memory.slots, state)


def draw(found: timeline.Timeline, title: str, path: Path) -> None:
    """Write the picture."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {"font.size": 9, "svg.hashsalt": "qgalore", "svg.fonttype": "none", "font.family": "sans-serif"}
    )
    figure, axes = plt.subplots(figsize=(9, 2.4))
    for bar in found.bars:
        kind, number = bar.lane, bar.what.partition("block ")[2].partition(" ")[0]
        if bar.lane == "compute":
            kind, _, number = bar.what.partition(" ")
        place, width = list(LANES).index(bar.lane), (bar.end - bar.start) * 1e3
        axes.broken_barh([(bar.start * 1e3, width)], (place - 0.36, 0.72), color=COLOURS[kind], edgecolor="white")
        if bar.end - bar.start > found.seconds / 60:
            axes.text((bar.start + bar.end) * 500, place, number, ha="center", va="center", color="white", fontsize=8)
    axes.set_yticks(range(len(LANES)), LANES.values())
    axes.invert_yaxis()
    axes.set_xlabel("ms; the numbers are those of the blocks, dark green is the backward direction")
    axes.set_title(title, fontsize=9)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--tokens", type=int, default=4096, help="of a step")
    parser.add_argument("--link", type=float, default=LINK / 1e9, help="GB a second each way (%(default)s)")
    parser.add_argument("--speed", type=float, default=SPEED / 1e12, help="TFLOP a second (%(default)s)")
    parser.add_argument("--forward", type=float, help="measured seconds of a block, for all micro-batches")
    parser.add_argument("--backward", type=float, help="the same for its backward direction, with its step")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("changes", nargs="*", help="key=value")
    options = parser.parse_args(arguments)
    if (options.forward is None) != (options.backward is None):
        parser.error("--forward and --backward go together")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(sys.argv[1:] if arguments is None else arguments)
    found = planned(options.config, options.changes)
    link, speed, blocks = options.link * 1e9, options.speed * 1e12, len(found.records)
    if options.forward is None:
        line, how = timeline.of_tokens(found, options.tokens, link, speed), f"{options.tokens:,} tokens"
    else:
        line = timeline.timeline(found, [options.forward] * blocks, [options.backward] * blocks, 0.0, link)
        how = "measured blocks"
    title = f"{blocks} blocks, {how}, {options.link:g} GB/s each way, {found.slots} slots"
    title += f": the computation waits {line.waited * 1e3:.1f} ms"
    draw(line, title, options.out)
    print(f"{title} of {line.seconds * 1e3:.1f} ms; hidden from {found.tokens_to_hide(link, speed):,} tokens on")
    return 0


if __name__ == "__main__":
    sys.exit(door.leave(main))
