"""The records sent to a tracker; its package, ``trackio`` or ``wandb``, is only needed here."""

import importlib
from collections import defaultdict

from ..errors import ConfigError
from .records import Run
from .tensorboard import scalars

PACKAGES = ("trackio", "wandb")  # of one interface: init, log by step, finish


def send(run: Run, package: str, project: str) -> int:
    """Log every scalar of ``run``, step by step, as the run of that name in ``project``; returns their number.

    Where they go (a local store, a server, offline files) is the package's own setting. Raises :class:`ConfigError` if
    the package is not installed or refuses.
    """
    try:
        tracker = importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"--{package} needs the package {package}, which cannot be imported ({error}); install it with "
            f"pip install {package} or leave the option out"
        ) from error
    steps: dict[int, dict[str, float]] = defaultdict(dict)
    for tag, value, step in scalars(run):
        steps[step][tag] = value
    try:
        tracker.init(project=project, name=run.name)
        for step in sorted(steps):  # trackers drop steps that go back
            tracker.log(steps[step], step=step)
        tracker.finish()
    except Exception as error:  # whatever a service says: the records themselves are safe
        raise ConfigError(
            f"{package} did not take the records of {run.name}: {error}; see its documentation"
        ) from error
    return sum(map(len, steps.values()))
