"""Stopping a run from outside."""

import signal
import threading
from typing import Any


class StopSignal:
    """Turns the first SIGINT or SIGTERM into a request that the loop sees after its step; a second one acts at once."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: Any) -> None:
        self.number = number
        print(
            f"{signal.Signals(number).name}: finishing this step, then saving (once more to stop at once)", flush=True
        )
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __exit__(self, *_: object) -> None:
        self._restore()
