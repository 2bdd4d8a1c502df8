"""Trackers: programs that show a run's scalars while it trains, each behind one class that alone knows its package.

Tags and values are those of :mod:`tensorboard`. Where a package sends them, and whether it does so at once or later,
is its own setting (``WANDB_MODE``, ``TRACKIO_SPACE_ID``); nothing of that is decided here.
"""

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from .. import plain_yaml
from ..errors import ConfigError

PROJECT = "qgalore"  # where neither the user nor the environment names one
PATIENCE = 30.0  # seconds that the end of a run waits for a service, and twice that at a question at its beginning


@dataclass(frozen=True)
class Description:
    """What a tracker is told of a run: its name, what it is made of, and the ``step`` it goes on from. ``identity`` is
    the same for every part of a run that was resumed. ``folder`` takes files of the tracker, and ``project`` holds the
    run, where the environment names no other."""

    name: str
    folder: Path | None = None
    project: str | None = None
    identity: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    resumed: bool = False


class Tracker(Protocol):
    """One package. Making the object imports it and raises :class:`ConfigError` if that cannot be done."""

    def begin(self, run: Description) -> None: ...

    def send(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def go_back(self, step: int) -> None:
        """What was sent of later steps counts no more: the run takes them again."""
        ...

    def end(self, code: int) -> None:
        """Send what still waits. ``code`` is the exit code of the run."""
        ...


def imported(name: str, asked: str) -> Any:
    """The module ``name``, for the wish ``asked``. Raises :class:`ConfigError` with what to install."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name if "." not in name else name.rpartition(".")[2]
        raise ConfigError(
            f"{asked} needs the package {package}, which cannot be imported ({error}); install it with "
            f"pip install {package} or leave it out"
        ) from error


class TensorBoard:
    """Event files in ``tensorboard`` under the run's folder."""

    def __init__(self, asked: str) -> None:
        self._package = imported("torch.utils.tensorboard", asked)

    def begin(self, run: Description) -> None:
        assert run.folder is not None, "event files need a folder"
        self._folder = run.folder / "tensorboard"
        self._open(run.step + 1 if run.resumed else None)
        if run.settings:
            text = "".join(f"    {line}\n" for line in plain_yaml.write(run.settings).splitlines())
            self._writer.add_text("config", text, run.step)

    def _open(self, purge_step: int | None) -> None:
        self._writer = self._package.SummaryWriter(str(self._folder), purge_step=purge_step, flush_secs=10)

    def send(self, step: int, scalars: Mapping[str, float]) -> None:
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, step)

    def go_back(self, step: int) -> None:
        self._writer.close()
        self._open(step + 1)

    def end(self, code: int) -> None:
        self._writer.close()


class Wandb:
    """A run at Weights & Biases, or its files in ``wandb`` under the run's folder with ``WANDB_MODE=offline``."""

    def __init__(self, asked: str) -> None:
        self._package = imported("wandb", asked)

    def begin(self, run: Description) -> None:
        package = self._package
        # without a limit, a question for a key or a slow network would keep a run from beginning or ending
        package.setup(self._limits(login_timeout=2 * PATIENCE))
        place = {"dir": str(run.folder)} if run.folder is not None and "WANDB_DIR" not in os.environ else {}
        self._run = package.init(
            project=run.project or os.environ.get("WANDB_PROJECT") or PROJECT,
            name=run.name,
            id=run.identity,
            resume="allow" if run.identity is not None else None,
            config=run.settings,
            allow_val_change=True,  # a resumed run may have more steps
            # the address of a repository may hold a token, and what is printed may quote one
            settings=self._limits(console="off", disable_git=True, finish_timeout=PATIENCE),
            **place,
        )
        # Steps of its own only grow, and rows of steps that are taken again would be dropped.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def _limits(self, **values: Any) -> Any:
        """Those settings that this version has and the environment does not give."""
        known = self._package.Settings.model_fields
        wanted = {k: v for k, v in values.items() if k in known and f"WANDB_{k.upper()}" not in os.environ}
        return self._package.Settings(**wanted)

    def send(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log({"step": step, **scalars})

    def go_back(self, step: int) -> None:
        """Nothing: rows carry their step, and later ones are drawn over earlier ones."""

    def end(self, code: int) -> None:
        self._run.finish(exit_code=code)


class Trackio:
    """A run of trackio, in its local folder or wherever ``TRACKIO_SPACE_ID`` says."""

    def __init__(self, asked: str) -> None:
        self._package = imported("trackio", asked)

    def begin(self, run: Description) -> None:
        self._run = self._package.init(
            project=run.project or os.environ.get("TRACKIO_PROJECT") or PROJECT,
            name=run.name,
            config=run.settings,
            resume="allow" if run.resumed else "never",  # it finds a run by its name
        )

    def send(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def go_back(self, step: int) -> None:
        """Nothing: rows of a step that is taken again stand beside the earlier ones."""

    def end(self, code: int) -> None:
        self._package.finish()
        # Its threads go on after an error and warn on standard error. No call returns it, and the run notes which.
        noted = sorted(getattr(self._run, "_warned_failures", ()))
        if lost := [name for name in noted if name.startswith(("write-logs", "persist-logs", "local-sender"))]:
            raise RuntimeError(f"some figures could not be written ({', '.join(lost)}), see its own warning")


TRACKERS = {"tensorboard": TensorBoard, "trackio": Trackio, "wandb": Wandb}


def make(names: list[str], asked: str = "tracking: {}") -> dict[str, Tracker]:
    """The trackers of those names. ``asked`` is how a message calls the wish for one. Raises :class:`ConfigError`."""
    return {name: TRACKERS[name](asked.format(name)) for name in names}
