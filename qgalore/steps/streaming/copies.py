"""Copies between host and device that run beside the computation, in two directions at once.

An engine starts a copy *after* some moments: others of its copies, or a moment of the computation. It gives back the
moment at which the copy is done. The computation can be made to wait for a moment, and so can the program.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ...errors import QGaloreError

WAYS = ("in", "out")  # to the device, and back
Span = tuple[int, int]


class CopyError(QGaloreError):
    """A copy failed; the message names what was copied."""

    def __init__(self, what: str, error: Exception) -> None:
        super().__init__(
            f"{what} failed: {type(error).__name__}: {error}. Some blocks may have taken the step and others not. "
            "Go on from the last checkpoint"
        )


@dataclass(frozen=True)
class Moment:
    """A point in the order of things. ``what`` names the copy that ends there."""

    mark: Any
    what: str = ""


class Copies(Protocol):
    """See the module. Copies of one way run in the order in which they were started."""

    def start(self, way: str, target: Tensor, source: Tensor, span: Span, after: Sequence[Moment], what: str) -> Moment:
        """Copy the bytes of ``span`` (first, end) between two buffers. ``what`` names them in an error."""
        ...

    def reached(self) -> Moment:
        """The moment at which the computation has done all that it was given so far."""
        ...

    def hold(self, moment: Moment) -> None:
        """Make the computation wait for ``moment``. Raises :class:`CopyError`, here or in :meth:`settle`."""
        ...

    def settle(self, moment: Moment) -> None:
        """Wait here until ``moment``. Raises :class:`CopyError`."""
        ...


class ThreadCopies:
    """Two threads, one for each way: for a CPU, where host and device are two pools of the same memory.

    ``delay``, for tests, gives the seconds that a copy takes: it sleeps in the middle, so that a reader who does not
    wait finds half of it.
    """

    def __init__(self, delay: Callable[[], float] | None = None) -> None:
        self._delay = delay
        self._threads = {way: ThreadPoolExecutor(1, thread_name_prefix=f"copies-{way}") for way in WAYS}

    def start(self, way: str, target: Tensor, source: Tensor, span: Span, after: Sequence[Moment], what: str) -> Moment:
        (a, b), earlier = span, list(after)

        def copy() -> None:
            for moment in earlier:
                self.settle(moment)
            half = (a + b) // 2
            target[a:half].copy_(source[a:half])
            if self._delay is not None:
                time.sleep(self._delay())
            target[half:b].copy_(source[half:b])

        return Moment(self._threads[way].submit(copy), what)

    def reached(self) -> Moment:
        """At once: a CPU computes when it is told to."""
        return Moment(None)

    def settle(self, moment: Moment) -> None:
        done: Future | None = moment.mark
        if done is None:
            return
        try:
            done.result()
        except CopyError:  # of an earlier copy, which is the one to name
            raise
        except Exception as error:  # whatever a copy fails with
            raise CopyError(moment.what, error) from error

    hold = settle


class CudaCopies:
    """Two streams of a CUDA device beside the one that computes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._streams = {way: torch.cuda.Stream(device) for way in WAYS}

    def start(self, way: str, target: Tensor, source: Tensor, span: Span, after: Sequence[Moment], what: str) -> Moment:
        stream = self._streams[way]
        for moment in after:
            stream.wait_event(moment.mark)
        try:
            with torch.cuda.stream(stream):
                target[slice(*span)].copy_(source[slice(*span)], non_blocking=True)
            return Moment(stream.record_event(), what)
        except RuntimeError as error:
            raise CopyError(what, error) from error

    def reached(self) -> Moment:
        return Moment(torch.cuda.current_stream(self.device).record_event())

    def hold(self, moment: Moment) -> None:
        torch.cuda.current_stream(self.device).wait_event(moment.mark)

    def settle(self, moment: Moment) -> None:
        try:
            moment.mark.synchronize()
        except RuntimeError as error:
            raise CopyError(moment.what, error) from error


def copies_for(device: torch.device) -> Copies:
    """The engine for ``device``."""
    return CudaCopies(device) if device.type == "cuda" else ThreadCopies()
