"""How fast a step can be: what it does, counted, and what a graphics card can do."""

from .cards import CARDS, Card, find, match
from .counting import Counts, count
from .roofline import EFFICIENCY, Part, parts, seconds, table

__all__ = ["CARDS", "EFFICIENCY", "Card", "Counts", "Part", "count", "find", "match", "parts", "seconds", "table"]
