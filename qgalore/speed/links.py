"""What joins graphics cards, at most, as the makers say. Nothing here was measured.

Inside a machine that is NVLink through a switch, or PCIe. Between machines it is a card's share of the network: servers
with NVLink have a network card for each graphics card, and others are assumed to share one. Sources: NVIDIA's product
pages for A100 and H100, the PCI-SIG's rates a lane with 128b/130b encoding, and the names of the networks.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """``rate``: 10⁹ bytes a second that a card sends over it at most, while as many arrive."""

    name: str
    rate: float


NVLINK_3 = Link("NVLink 3", 300)
NVLINK_4 = Link("NVLink 4", 450)
PCIE_4_8 = Link("PCIe 4 ×8", 15.8)
PCIE_4 = Link("PCIe 4 ×16", 31.5)
PCIE_5_8 = Link("PCIe 5 ×8", 31.5)
PCIE_5 = Link("PCIe 5 ×16", 63)
NETWORK_400 = Link("400 Gb/s network a card", 50)
NETWORK_200 = Link("200 Gb/s network a card", 25)
NETWORK_25 = Link("25 Gb/s network a card", 3.125)

Bytes = tuple[float, float]  # that a card sends inside its machine, and to others


def seconds(collectives: Iterable[Bytes], inside: Link, between: Link) -> float:
    """The time that ``collectives`` take on the wire, one after the other. Within one both links work at the same time,
    since what one machine hands on is split into many small pieces. Latencies and meetings are left out."""
    return sum(max(here / (inside.rate * 1e9), there / (between.rate * 1e9)) for here, there in collectives)
