"""What a conversion did: every layer, what was left alone and why, what trains in full."""

import math
from collections import Counter
from dataclasses import dataclass, field

from ..errors import counted


@dataclass(frozen=True)
class ConvertedLayer:
    """One converted layer: its name, weight shape (out, in), the rank and group size in force, and any deviation."""

    name: str
    shape: tuple[int, int]
    rank: int | None
    group_size: int | None
    side: str
    notes: tuple[str, ...] = ()
    max_rank: int | None = None  # up to which the rank is free to move


@dataclass
class ConversionReport:
    """What :func:`convert.convert` did. ``print(report)`` gives the table."""

    converted: list[ConvertedLayer] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # layer name → why it was left alone
    dense: dict[str, int] = field(default_factory=dict)  # other trainable tensors → elements

    @property
    def converted_elements(self) -> int:
        return sum(math.prod(layer.shape) for layer in self.converted)

    def __str__(self) -> str:
        rows: Counter = Counter()
        for layer in self.converted:
            label = next((part for part in reversed(layer.name.split(".")) if not part.isdigit()), layer.name)
            rank = layer.rank or "full" if layer.max_rank is None else f"≤ {layer.max_rank}"
            rows[(label, layer.shape, layer.side, rank, layer.group_size)] += 1
        lines = [f"{'layers':>6}  {'name':<14}{'out × in':>16}  {'basis':<6}{'rank':>6}  weight"]
        for (label, shape, side, rank, group), count in rows.items():
            size = f"{shape[0]} × {shape[1]}"
            weight = "as it was" if group is None else f"int8, groups of {'a row' if group == shape[1] else group}"
            lines.append(f"{count:>6}  {label:<14}{size:>16}  {side:<6}{rank:>6}  {weight}")
        notes = Counter(note for layer in self.converted for note in layer.notes)
        lines += [f"note: {note} ({counted(count, 'layer')})" for note, count in notes.items()]
        dense = sum(self.dense.values())
        lines.append(
            f"converted: {self.converted_elements:,} weights in {counted(len(self.converted), 'layer')}; "
            f"trained in full: {dense:,} values in {counted(len(self.dense), 'tensor')}"
        )
        if dense:
            lines.append("in full: " + _summary(self.dense))
        for name, why in self.skipped.items():
            lines.append(f"not converted: {name} ({why})")
        return "\n".join(lines)


def _summary(dense: dict[str, int]) -> str:
    """Tensors grouped by their last two name parts, with counts."""
    kinds = Counter(".".join(name.split(".")[-2:]) for name in dense)
    return ", ".join(name if count == 1 else f"{count} × {name}" for name, count in kinds.items())
