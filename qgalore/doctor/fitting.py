"""Which shipped configurations fit on a card, and the tokens a second to expect, by arithmetic.

A step grows by the same amount with every block, so that two small models of a configuration's shape tell of the whole:
its counts and its memory are continued in a straight line.
"""

from pathlib import Path

from .. import config as configuration
from .. import speed
from ..config import Config
from ..memory.plan import human
from ..models import loading
from ..training import roofline
from ..training.fit import plan_for
from ..training.model import Vocabulary

SHIPPED = ("llama1b.yaml", "llama7b_12gb.yaml", "llama7b_16gb.yaml", "llama3_8b_16gb.yaml", "llama13b_16gb.yaml")
GIB = 2**30


def _depth(config: Config, vocabulary: int) -> int:
    shape = loading.model_config(config.model.config, tokenizer_size=vocabulary, overrides=config.model.overrides)
    return shape.num_hidden_layers


def expected(name: str, card: speed.Card, efficiency: dict[str, float]) -> tuple[float, float]:
    """(bytes of the planned peak, tokens a second) of the configuration ``name`` on ``card``."""
    config = configuration.resolve(configuration.load(name, []), "cuda", True, 1)
    entries = config.model.overrides.get("vocab_size", config.data.vocab_size)
    vocabulary = Vocabulary(entries, None, None)
    depth, found = _depth(config, entries), []
    for layers in (1, 2):
        model = config.model.model_copy(update={"overrides": {**config.model.overrides, "num_hidden_layers": layers}})
        small = config.model_copy(update={"model": model})
        counts, tokens = roofline.counts_of(small, vocabulary)
        found.append((counts, plan_for(small, vocabulary, "cuda").total))
    (one, small_peak), (two, peak) = found
    counts = one + (two + one * -1.0) * (depth - 1)
    seconds = speed.seconds(speed.parts(counts, card, efficiency))
    return small_peak + (peak - small_peak) * (depth - 1), tokens / seconds


def lines(card: speed.Card, efficiency: dict[str, float], names: tuple[str, ...] = SHIPPED) -> list[str]:
    """A line for each configuration."""
    found = [f"{'configuration':<26}{'planned':>10}  {'fits':<5}{'tokens/s':>9}"]
    for name in names:
        size, pace = expected(name, card, efficiency)
        # A desktop and the driver keep some of a card: the shipped budgets leave half a GiB too.
        fits = size <= (card.size - 0.5) * GIB
        found.append(f"{Path(name).name:<26}{human(round(size)):>10}  {'yes' if fits else 'no':<5}{pace:>9,.0f}")
    return found
