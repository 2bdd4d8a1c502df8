"""Counting what PyTorch's tensors hold while a step is rehearsed on the meta device."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .repeats import Repeats
from .stand_ins import answer

ON_HOST = "host"  # the label of what waits in host memory and does not count on the device
TEMPORARIES = "temporaries"
_REPEATS = Repeats()  # of all rehearsals
REHEARSED = 4  # micro-batches: the first, the second, one that stands for all others, and the last

Size = Callable[[int], int]


class Meter(TorchDispatchMode):
    """Counts the storage of every tensor made while it is on, by the ``label`` in force, until it is freed.

    Those in ``present`` (storage identities) are there before and after, and not counted. ``more`` micro-batches of a
    step are not rehearsed. ``number`` is the one at work, None between them. All have the same shapes. So what waits
    now for another one (number 2, or 1 when the last is at work) waits for each of those that are not rehearsed too.
    The moments of number 2 itself are left out where it stands for others. Memory grows or shrinks evenly from number 1
    to the last, and both of these are looked at. ``on_host``: what a buffer of so many bytes takes in host memory.
    """

    def __init__(self, present: set[int], more: int = 0, on_host: Size = int) -> None:
        super().__init__()
        self.present, self.more, self.on_host = present, more, on_host
        self.label, self.number = TEMPORARIES, None
        self.peak, self.at_peak, self.host_peak = 0, Counter(), 0
        self._live: Counter[tuple[str, int | None]] = Counter()
        # The same by micro-batch alone.
        self._device: Counter[int | None] = Counter()
        self._host: Counter[int | None] = Counter()
        self._varying: list[tuple[UntypedStorage, str]] = []
        self._known: dict[int, tuple[weakref.ref, tuple[str, int | None], int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if (found := answer(func, args, kwargs or {})) is not None:
            return found
        result = _REPEATS.run(func, args, kwargs or {})
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self.count(value)
        return result

    def count(self, tensor: Tensor | None, label: str | None = None) -> None:
        """Count ``tensor``'s storage if it is new, or move it to ``label``."""
        if tensor is None:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.present:
            return
        if key in self._known:
            if label is not None:
                reference, (old, number), size = self._known[key]
                self._add((old, number), -size)
                self._known[key] = reference, (label, number), size
                self._add((label, number), size)
            return
        place = (label or self.label, self.number)
        size = self.on_host(storage.nbytes()) if place[0] == ON_HOST else storage.nbytes()
        self._known[key] = (weakref.ref(storage, lambda _: self._free(key)), place, size)
        self._add(place, size)
        self.look()

    def _add(self, place: tuple[str, int | None], size: int) -> None:
        label, number = place
        self._live[place] += size
        (self._host if label == ON_HOST else self._device)[number] += size

    def _free(self, key: int) -> None:
        _, place, size = self._known.pop(key)
        self._add(place, -size)

    def vary(self, storage: UntypedStorage, label: str) -> None:
        """Count ``storage``, which is resized in place, as large as it is at each look."""
        self._varying.append((storage, label))

    def _standing_for_others(self) -> int | None:
        """The rehearsed micro-batch that has now what each of those has that are not; None for a moment to leave
        out."""
        return {0: 2, 1: 2, 2: None}.get(self.number, 1) if self.more else 1

    def look(self) -> None:
        """Compare the present moment with the worst one so far."""
        other = self._standing_for_others()
        if other is None:
            return
        varying = sum(storage.nbytes() for storage, _ in self._varying)
        total = sum(self._device.values()) + self.more * self._device[other] + varying
        self.host_peak = max(self.host_peak, sum(self._host.values()) + self.more * self._host[other])
        if total > self.peak:
            self.peak, self.at_peak = total, Counter()
            for (label, number), size in self._live.items():
                self.at_peak[label] += size * (1 + self.more * (number == other))
            for storage, label in self._varying:
                self.at_peak[label] += storage.nbytes()

    @contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        """Inside, what is new counts as ``label``."""
        before, self.label = self.label, label
        try:
            yield
        finally:
            self.label = before
