"""How fast a step can be: what it does, counted, and what a graphics card can do."""

from .cards import CARDS, Card, find, match
from .counting import Counts, count, count_forward
from .links import Link
from .roofline import EFFICIENCY, Part, parts, seconds, table

__all__ = [
    "CARDS",
    "EFFICIENCY",
    "Card",
    "Counts",
    "Link",
    "Part",
    "count",
    "count_forward",
    "find",
    "match",
    "parts",
    "seconds",
    "table",
]
