"""Which shipped configurations fit on a card, and the tokens a second to expect, by arithmetic."""

from pathlib import Path

from .. import speed
from ..memory.plan import human
from ..training import roofline

SHIPPED = ("llama1b.yaml", "llama7b_12gb.yaml", "llama7b_16gb.yaml", "llama3_8b_16gb.yaml", "llama13b_16gb.yaml")
GIB = 2**30


def lines(card: speed.Card, efficiency: dict[str, float], names: tuple[str, ...] = SHIPPED) -> list[str]:
    """A line for each configuration."""
    found = [f"{'configuration':<26}{'planned':>10}  {'fits':<5}{'tokens/s':>9}"]
    for name in names:
        size, pace = roofline.expected(name, card, efficiency)
        # A desktop and the driver keep some of a card: the shipped budgets leave half a GiB too.
        fits = size <= (card.size - 0.5) * GIB
        found.append(f"{Path(name).name:<26}{human(round(size)):>10}  {'yes' if fits else 'no':<5}{pace:>9,.0f}")
    return found
