"""What graphics cards can do at most, as their makers say. Nothing here was measured.

Rates are of dense matrices: bf16 operands with fp32 sums, and int8 operands with int32 sums. GeForce cards sum in fp32
at half the rate that is often quoted, which is that of fp16 sums. Source: NVIDIA's architecture whitepapers for Turing,
Ampere, Ada, Hopper and Blackwell.
"""

from dataclasses import dataclass

from ..errors import ConfigError
from .links import NETWORK_25, NETWORK_200, NETWORK_400, NVLINK_3, NVLINK_4, PCIE_4, PCIE_4_8, PCIE_5, PCIE_5_8, Link


@dataclass(frozen=True)
class Card:
    """``bf16`` and ``int8``: 10¹² operations a second; ``memory``: 10⁹ bytes a second; ``size``: GB. ``inside`` joins
    it to the others in its machine, and ``between`` to other machines."""

    name: str
    bf16: float
    int8: float
    memory: float
    size: int
    inside: Link = PCIE_4
    between: Link = NETWORK_25


CARDS = (
    Card("RTX 3060", 25.5, 102, 360, 12),
    Card("RTX 3090", 71, 284, 936, 24),
    Card("RTX 4060 Ti", 44.1, 176, 288, 16, PCIE_4_8),
    Card("RTX 4070 Ti Super", 88.2, 353, 672, 16),
    Card("RTX 4080", 97.5, 390, 717, 16),
    Card("RTX 4090", 165.2, 661, 1008, 24),
    Card("RTX 5060 Ti", 47.4, 190, 448, 16, PCIE_5_8),
    Card("RTX 5070 Ti", 87.9, 352, 896, 16, PCIE_5),
    Card("RTX 5080", 112.6, 450, 960, 16, PCIE_5),
    Card("RTX 5090", 209.5, 838, 1792, 32, PCIE_5),
    Card("A100", 312, 624, 1555, 40, NVLINK_3, NETWORK_200),
    Card("H100", 989, 1979, 3350, 80, NVLINK_4, NETWORK_400),
)


def _plain(name: str) -> str:
    return "".join(name.lower().replace("nvidia", "").replace("geforce", "").split())


def match(name: str) -> Card | None:
    """The card that ``name`` means, as a user or a driver writes it; None if it is not in the table."""
    named = [card for card in CARDS if _plain(card.name) in _plain(name)]
    return max(named, key=lambda card: len(card.name), default=None)


def find(name: str) -> Card:
    """:func:`match`. Raises :class:`ConfigError` if there is none."""
    card = match(name)
    if card is None:
        known = ", ".join(card.name for card in CARDS)
        raise ConfigError(f"the card {name!r} is not in the table; give one of {known}")
    return card
