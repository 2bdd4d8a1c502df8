"""Stopping a run from outside."""

import signal
import sys
import threading
from contextlib import suppress
from typing import Any

HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none


class StopSignal:
    """Turns the first SIGINT, SIGTERM or SIGHUP into a request that the loop sees after its step; a second one acts at
    once, but for SIGHUP.

    A terminal that goes away sends SIGHUP, often twice, and takes nothing more that is printed. What a process was told
    to ignore, by ``nohup``, stays ignored.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT, signal.SIGTERM]
            if HANGUP is not None and signal.getsignal(HANGUP) != signal.SIG_IGN:
                numbers.append(HANGUP)
            for number in numbers:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: Any) -> None:
        self.number = number
        self._restore()
        if HANGUP in self._previous:
            signal.signal(HANGUP, signal.SIG_IGN)
        text = f"{signal.Signals(number).name}: finishing this step, then saving (once more to stop at once)"
        if number == HANGUP:
            text = "SIGHUP: finishing this step, then saving"
            sys.stdout, sys.stderr = _Forgiving(sys.stdout), _Forgiving(sys.stderr)
        print(text, flush=True)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __exit__(self, *_: object) -> None:
        self._restore()


class _Forgiving:
    """A stream that drops what its terminal, or the program it is piped into, no longer takes: both end by the same
    signal, and a line that cannot be printed must not cost the state."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
