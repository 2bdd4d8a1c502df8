"""What a step of a configuration does, counted, and how long a card would take for it:

    python tools/roofline.py llama7b_16gb.yaml --card "RTX 4060 Ti" [--share products=0.9 …] [key=value …]

Nothing is loaded and no GPU is needed: the step runs on tensors without values, and its operations are counted. The
seconds follow from a table of cards and from the share of each rate that is assumed to be reached. ``--share`` changes
such a share. The step is layer-major, with one process.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from qgalore.cli import door
from qgalore.errors import ConfigError


def shares(given: list[str]) -> dict[str, float]:
    from qgalore.speed import EFFICIENCY

    found = {}
    for item in given:
        name, _, text = item.partition("=")
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if name not in EFFICIENCY or not 0.0 < value <= 1.0:
            known = ", ".join(EFFICIENCY)
            raise ConfigError(f"--share {item}: give NAME=VALUE with a value up to 1 and one of the names {known}")
        found[name] = value
    return found


def run(options: argparse.Namespace) -> None:
    from qgalore import config, speed
    from qgalore.training import roofline

    card = speed.find(options.card)
    efficiency = shares(options.share)
    counts, tokens = roofline.counts_for_a_card(config.load(options.config, options.overrides))
    used = {**speed.EFFICIENCY, **efficiency}
    print(f"{options.config}, {tokens:,} tokens a step; assumed shares of the {card.name}'s rates:")
    print("  " + ", ".join(f"{name} {share:.0%}" for name, share in used.items()))
    print(speed.table(speed.parts(counts, card, efficiency), card, tokens))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML file, here or one that comes with qgalore")
    parser.add_argument("--card", required=True, help="its name, RTX 4060 Ti say")
    parser.add_argument("--share", nargs="+", default=[], metavar="NAME=VALUE", help="of a rate that is reached")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the configuration")
    options = parser.parse_intermixed_args(arguments)
    return door.leave(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
