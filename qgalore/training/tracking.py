"""What a run sends to trackers while it trains. None of them can stop it."""

import json
import re
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ..convergence import live, tensorboard
from ..errors import ConfigError, printable, without_secrets
from ..files import atomic
from .say import say

NAME = "tracking.json"  # in a run's folder
Row = dict[str, Any]
_LATER = {"tensorboard": "DIR", "trackio": "PROJECT", "wandb": "PROJECT"}


class Tracking:
    """Sends the rows of the records to ``trackers`` between entering and leaving its context. What a tracker raises
    becomes one printed line, and nothing more is asked of it. Leaving by an error ends the trackers with its exit
    code."""

    def __init__(self, trackers: dict[str, live.Tracker], run: live.Description) -> None:
        self._trackers, self._run = dict(trackers), run

    def __enter__(self) -> "Tracking":
        self._each(lambda tracker: tracker.begin(self._run))
        if self._trackers:
            say("tracking", ", ".join(self._trackers))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        code = 0 if kind is None else getattr(error, "exit_code", 1)
        self._each(lambda tracker: tracker.end(code))
        self._trackers.clear()

    def send(self, metrics: Sequence[Row], refreshes: Sequence[Row] = (), updates: Sequence[Row] = ()) -> None:
        """Rows of one step, of metrics.jsonl, subspace.jsonl and updates.jsonl."""
        if self._trackers:
            found = {tag: value for tag, value, _ in tensorboard.of_rows(metrics, refreshes, updates)}
            self._each(lambda tracker: tracker.send(metrics[0]["step"], found))

    def go_back(self, step: int) -> None:
        """The run returned to where it was after ``step``, and takes the later ones again."""
        self._each(lambda tracker: tracker.go_back(step))

    def _each(self, ask: Callable[[Any], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                ask(tracker)
            except Exception as error:  # whatever a package or a service says: the run goes on without it
                del self._trackers[name]
                what = printable(without_secrets(f"{type(error).__name__}: {' '.join(str(error).split())}"))
                print(
                    f"warning: tracking by {name} ends here: {what}. The run goes on and its records are whole; send "
                    f"them later with qgalore convergence {self._run.folder} --{name} {_LATER[name]}",
                    flush=True,
                )


NOWHERE = Tracking({}, live.Description("nowhere"))


class Wanted:
    """The ``trackers`` of a run that is still to be built in ``folder``, and whether it was tracked before. Raises
    :class:`ConfigError` for a damaged file."""

    def __init__(self, trackers: dict[str, live.Tracker], folder: Path) -> None:
        self._trackers, self._folder = trackers, folder
        self._identity = kept_identity(folder) if trackers else None

    def of(self, name: str, step: int, settings: dict[str, Any]) -> Tracking:
        """The tracking of the run ``name`` from ``step`` on. By its identity, which is kept in its folder, a resumed
        run goes on in the same run of a tracker. Raises :class:`ConfigError`."""
        if not self._trackers:
            return NOWHERE
        identity = self._identity or uuid.uuid4().hex[:16]
        if self._identity is None:
            with atomic.explained(str(self._folder / NAME), "Free space or set run.dir"):
                atomic.write_text(self._folder / NAME, json.dumps({"identity": identity}) + "\n")
        resumed = self._identity is not None
        return Tracking(self._trackers, live.Description(name, self._folder, None, identity, settings, step, resumed))


def kept_identity(folder: Path) -> str | None:
    """The identity of a run that was tracked before, or None. Raises :class:`ConfigError` if it cannot be read."""
    path, remedy = folder / NAME, "Delete it, and the run goes on as a new one in its trackers"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["identity"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}. {remedy}") from error
    if not isinstance(found, str) or not re.fullmatch("[0-9a-f]{16}", found):
        raise ConfigError(f"{path} holds no identity of a run. {remedy}")
    return found
