"""The seconds that a step's parts take on a card, from counts and from the shares of its rates that are reached."""

from dataclasses import dataclass

from .cards import Card
from .counting import Counts

# Shares of a card's rates. They are assumptions until a card says otherwise, and ``qgalore doctor`` measures the first.
EFFICIENCY = {"products": 0.85, "integers": 0.5, "merge": 0.56, "attention": 0.5, "memory": 0.85}
LAUNCH = 6e-6  # seconds that a CPU takes to start a kernel, while the GPU works
WAIT = 2e-4  # seconds that a GPU has nothing to do after it was waited for


@dataclass(frozen=True)
class Part:
    """A part of a step: ``amount`` in ``unit``, and its ``seconds``; ``beside``: it runs beside the others."""

    name: str
    amount: float
    unit: str
    seconds: float
    beside: bool = False


def parts(counts: Counts, card: Card, efficiency: dict[str, float] | None = None) -> list[Part]:
    """The parts of a step. ``efficiency`` changes some of ``EFFICIENCY``."""
    share = {**EFFICIENCY, **(efficiency or {})}
    bf16, memory = card.bf16 * 1e12, card.memory * 1e9 * share["memory"]
    return [
        Part("products, bf16", counts.products / 1e12, "TFLOP", counts.products / (bf16 * share["products"])),
        Part("products, int8", counts.integers / 1e12, "TOP", counts.integers / (card.int8 * 1e12 * share["integers"])),
        Part("merge", counts.merge / 1e12, "TFLOP", counts.merge / (bf16 * share["merge"])),
        Part("attention", counts.attention / 1e12, "TFLOP", counts.attention / (bf16 * share["attention"])),
        Part("elementwise", counts.moved / 1e9, "GB", counts.moved / memory),
        Part("stored formats", counts.formats / 1e9, "GB", counts.formats / memory),
        Part("waits", counts.waits, "", counts.waits * WAIT),
        Part("launches", counts.launches, "", counts.launches * LAUNCH, beside=True),
    ]


def seconds(found: list[Part]) -> float:
    """Of a step: the GPU's parts one after the other, or the CPU's launches if these take longer."""
    return max(sum(p.seconds for p in found if not p.beside), *(p.seconds for p in found if p.beside))


def table(found: list[Part], card: Card, tokens: int) -> str:
    """The parts as lines, and the tokens a second that follow."""
    lines = [f"{'part':<16}{'amount':>12} {'':<6}{'seconds':>9}"]
    for part in found:
        beside = "  beside the others" if part.beside else ""
        lines.append(f"{part.name:<16}{part.amount:>12,.1f} {part.unit:<6}{part.seconds:>9.3f}{beside}")
    whole = seconds(found)
    lines.append(
        f"{'step':<16}{'':>12} {'':<6}{whole:>9.3f}  {tokens / whole:,.0f} tokens/s on a {card.name}, by arithmetic"
    )
    return "\n".join(lines)
