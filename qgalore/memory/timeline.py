"""The timeline of a streamed step, from how long its blocks compute and how fast its link is. The engine that streams
real blocks runs here with copies that take no bytes but note when they would begin and end."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..steps.streaming.copies import Moment, Span
from ..steps.streaming.stream import Stream
from .streamed import Streamed


@dataclass(frozen=True)
class Bar:
    """What a ``lane`` (``compute``, ``in`` or ``out``) does from ``start`` to ``end``, in seconds."""

    lane: str
    what: str
    start: float
    end: float


@dataclass
class Timeline:
    """A step's bars in their order, and the seconds for which the computation ``waited`` for copies after its first
    block had come."""

    bars: list[Bar] = field(default_factory=list)
    waited: float = 0.0

    @property
    def seconds(self) -> float:
        """From the first copy to the last."""
        return max(bar.end for bar in self.bars)


class _Clock:
    """Copies on paper: ``link`` bytes a second each way. A moment's mark is its time. The program that starts the
    copies takes no time itself, as with a GPU it runs ahead."""

    def __init__(self, link: float) -> None:
        self.link, self.now, self.timeline = link, 0.0, Timeline()
        self._free = {"in": 0.0, "out": 0.0}

    def start(self, way: str, target: Tensor, source: Tensor, span: Span, after: Sequence[Moment], what: str) -> Moment:
        begin = max([self._free[way], *(moment.mark for moment in after)])
        end = self._free[way] = begin + (span[1] - span[0]) / self.link
        self.timeline.bars.append(Bar(way, what, begin, end))
        return Moment(end, what)

    def reached(self) -> Moment:
        return Moment(self.now)

    def hold(self, moment: Moment) -> None:
        if moment.mark > self.now:
            if any(bar.lane == "compute" for bar in self.timeline.bars):
                self.timeline.waited += moment.mark - self.now
            self.now = moment.mark

    def settle(self, moment: Moment) -> None:
        """Nothing to wait for: time is on paper."""

    def compute(self, what: str, seconds: float) -> None:
        """The computation goes on for so long."""
        self.timeline.bars.append(Bar("compute", what, self.now, self.now + seconds))
        self.now += seconds


def timeline(
    streamed: Streamed, forward: Sequence[float], backward: Sequence[float], between: float, link: float
) -> Timeline:
    """A step of the blocks of ``streamed``, which compute for ``forward`` and ``backward`` seconds each, with the loss
    taking the seconds ``between``, and copies of ``link`` bytes a second each way."""
    blocks = [nn.Module() for _ in streamed.records]
    clock = _Clock(link)
    stream = Stream(nn.Module(), blocks, torch.device("meta"), slots=streamed.slots, copies=clock)
    # the same records without tensors: nothing is there to be moved
    stream.records = [
        replace(r, fields=[replace(f, find=_nothing) for f in r.fields], memory=torch.empty(0))
        for r in streamed.records
    ]
    stream.begin()
    for number, seconds in enumerate(forward):
        stream.enter(number, backward=False)
        clock.compute(f"forward {number}", seconds)
        stream.leave(number, stepped=False)
    clock.compute("loss", between)
    for number in reversed(range(len(blocks))):
        stream.enter(number, backward=True)
        clock.compute(f"backward {number}", backward[number])
        stream.leave(number, stepped=True)
    stream.end(whole=True)
    return clock.timeline


def of_tokens(streamed: Streamed, tokens: int, link: float, speed: float) -> Timeline:
    """The timeline of a step of so many ``tokens`` on a device that does ``speed`` operations a second. The loss takes
    as long as the last block's forward direction."""
    forward = [2.0 * weights * tokens / speed for weights in streamed.weights]
    return timeline(streamed, forward, [3.0 * seconds for seconds in forward], forward[-1], link)


def _nothing() -> None:
    return None
