"""Stopping a run from outside."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none
NO_READER = 13  # SIGPIPE: the program that reads the output has ended


def silence_output() -> None:
    """Let standard output go nowhere. Its reader has gone, and Python, which flushes once more at the end, would
    complain again."""
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


class StopSignal:
    """Turns the first SIGINT, SIGTERM or SIGHUP into a request that the loop sees after its step; a second one acts at
    once, but for SIGHUP.

    A terminal that goes away sends SIGHUP, often twice, and takes nothing more that is printed. What a process was told
    to ignore, by ``nohup``, stays ignored. When the reader of the output ends (``| head``), that is such a request too,
    with the number of SIGPIPE: a line that nobody reads must not cost the state.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._previous: dict[int, Any] = {}
        self._output: Any = None

    def __enter__(self) -> "StopSignal":
        self._output = sys.stdout
        if sys.stdout is not None:  # as in a process that was started without one
            sys.stdout = _Watched(sys.stdout, self._reader_gone)
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
            sys.stdout, sys.stderr = (_Forgiving(s) if s is not None else None for s in (sys.stdout, sys.stderr))
        print(text, flush=True)

    def _reader_gone(self) -> None:
        silence_output()
        self.number = self.number or NO_READER

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __exit__(self, *_: object) -> None:
        self._restore()
        if isinstance(sys.stdout, _Watched):  # after SIGHUP it stays a stream that forgives
            sys.stdout = self._output


class _Stream:
    """A stream that answers for another one."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Forgiving(_Stream):
    """A stream that drops what its terminal, or the program it is piped into, no longer takes: both end by the same
    signal, and a line that cannot be printed must not cost the state."""

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()


class _Watched(_Stream):
    """A stream that calls ``gone()`` when the program that reads it has ended."""

    def __init__(self, stream: Any, gone: Callable[[], None]) -> None:
        super().__init__(stream)
        self._gone = gone

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except BrokenPipeError:
            self._gone()
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._gone()
