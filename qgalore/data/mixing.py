"""Several sources in one run, mixed by weight: which of them gives the next sample, and what a position in all is.

Weights are shares of samples, and so of tokens, since all samples are equally long.
"""

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

import numpy as np
import torch

from qgalore.data.documents import Documents
from qgalore.data.order import SampleOrder
from qgalore.data.paths import looks_like_path
from qgalore.data.sources import ENDINGS
from qgalore.errors import ConfigError

Positions = tuple[tuple[int, int], ...]  # (epoch, index) of the next sample of each source; () is the beginning of all


def turns(weights: Sequence[int], taken: Sequence[int]) -> Iterator[int]:
    """The sources that give the next samples, without an end, when each has given ``taken`` so far.

    After any n samples a source of weight w has given more than w n − 1 and fewer than w n + 1 of them, w being its
    share of all ``weights``. Its j-th sample (from 0) may come once j / w < n, and must come before n passes
    (j + 1) / w. Of those that may come, the one that must come first is taken; for windows like these that meets every
    limit (Baruah et al. 1996, proportionate progress). It is a function of ``taken`` alone and exact in integers.
    """
    given, total = list(taken), sum(weights)
    for n in itertools.count(sum(given) + 1):
        owed = [weight * n - total * count for weight, count in zip(weights, given, strict=True)]
        ready = [source for source, amount in enumerate(owed) if amount > 0]
        chosen = min(ready, key=lambda i: (-(-(given[i] + 1) * total // weights[i]), -owed[i]))
        given[chosen] += 1
        yield chosen


def whole_numbers(weights: Sequence[float]) -> list[int]:
    """The smallest integers in the proportions of ``weights``, which are taken as they were written."""
    exact = [Fraction(str(weight)) for weight in weights]
    scaled = [int(one * math.lcm(*(one.denominator for one in exact))) for one in exact]
    return [one // math.gcd(*scaled) for one in scaled]


class MixedOrder:
    """The order in which a run visits its training samples: those of each source in the source's own
    :class:`SampleOrder`, and the sources in :func:`turns`. Samples are numbered through, source after source."""

    def __init__(self, orders: Sequence[SampleOrder], weights: Sequence[int] = (1,), names: Sequence[str] = ("",)):
        self.orders, self.weights, self.names = tuple(orders), tuple(weights), tuple(names)
        self._first = list(itertools.accumulate((order.n_samples for order in self.orders), initial=0))

    def take(self, positions: Positions, count: int) -> tuple[list[int], Positions]:
        """The ``count`` sample numbers from ``positions`` on, and the positions after them. Raises ConfigError for
        positions that these sources do not have."""
        positions = positions or self._beginning
        which = list(itertools.islice(turns(self.weights, self._given(positions)), count))
        found = [order.take(at, which.count(source)) for source, (order, at) in enumerate(self._each(positions))]
        numbers = [iter(numbers) for numbers, _ in found]
        return [self._first[source] + next(numbers[source]) for source in which], tuple(after for _, after in found)

    def drawn(self, positions: Positions) -> dict[str, int]:
        """How many samples each source has given, by its name; one alone has none."""
        given = self._given(positions or self._beginning)
        return {name: count for name, count in zip(self.names, given, strict=True) if name}

    @property
    def _beginning(self) -> Positions:
        return ((0, 0),) * len(self.orders)

    def _given(self, positions: Positions) -> list[int]:
        return [order.n_samples * epoch + index for order, (epoch, index) in self._each(positions)]

    def _each(self, positions: Positions) -> Iterator[tuple[SampleOrder, tuple[int, int]]]:
        if len(positions) != len(self.orders):
            raise ConfigError(
                f"the position is in {len(positions)} sources, and data.train has {len(self.orders)}; resume with the "
                "sources that the checkpoint was made with"
            )
        return zip(self.orders, positions, strict=True)


class Samples(Protocol):
    def __len__(self) -> int: ...

    def batch(self, indices: Any) -> dict[str, Any]:
        """The samples at ``indices``, on the CPU, as the loss takes them."""
        ...


@dataclass(frozen=True)
class Mixture:
    """The samples of one source or several, numbered through. ``weights`` are whole numbers."""

    names: tuple[str, ...]
    weights: tuple[int, ...]
    sources: tuple[Samples, ...]

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def place(self, number: int) -> tuple[int, int]:
        """The source of a sample and its number there."""
        for source, samples in enumerate(self.sources):
            if number < len(samples):
                return source, number
            number -= len(samples)
        raise IndexError(f"there are only {len(self)} samples")

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """The samples at ``indices`` in their order, as their sources give them."""
        places = [self.place(int(number)) for number in indices]
        used = sorted({source for source, _ in places})
        if len(used) == 1:
            return self.sources[used[0]].batch([number for _, number in places])
        parts = [self.sources[one].batch([number for source, number in places if source == one]) for one in used]
        # Where each row of the parts, laid one behind the other, is to stand.
        rows = torch.tensor([row for one in used for row, (source, _) in enumerate(places) if source == one])
        merged: dict[str, Any] = {}
        for name, value in parts[0].items():
            if isinstance(value, torch.Tensor):
                stacked = torch.cat([part[name] for part in parts])
                merged[name] = torch.empty_like(stacked)
                merged[name][rows] = stacked
        if "documents" in parts[0]:
            merged["documents"] = Documents.of(np.asarray(merged["position_ids"]))
        return merged


def names_of(paths: Sequence[str]) -> list[str]:
    """A name for each source: that of its file without the ending, or of its folder or dataset; of equal ones the
    second is called NAME-2. One alone has none, which is ""."""
    if len(paths) == 1:
        return [""]
    found: list[str] = []
    for path in paths:
        plain = path.rstrip("/\\").replace("\\", "/")
        if looks_like_path(path, ENDINGS):
            plain = plain.rsplit("/", 1)[-1]
        ending = max((one for one in ENDINGS if plain.lower().endswith(one)), key=len, default="")
        name = re.sub(r"[^\w.+-]+", "-", plain.removesuffix(plain[len(plain) - len(ending) :])).strip("-.")[:90]
        choices = itertools.chain([name or "source"], (f"{name or 'source'}-{n}" for n in itertools.count(2)))
        found.append(next(one for one in choices if one not in found))
    return found
