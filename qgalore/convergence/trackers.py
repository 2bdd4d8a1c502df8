"""The records of a run sent to a tracker after they were made."""

from collections import defaultdict

from ..errors import ConfigError, without_secrets
from . import live
from .records import Run
from .tensorboard import scalars

PACKAGES = ("trackio", "wandb")  # those that take a project's name


def send(run: Run, package: str, project: str) -> int:
    """Log every scalar of ``run``, step by step, as the run of that name in ``project``; returns their number. Raises
    :class:`ConfigError` if the package is not installed or refuses."""
    tracker = live.make([package], "--{}")[package]
    steps: dict[int, dict[str, float]] = defaultdict(dict)
    for tag, value, step in scalars(run):
        steps[step][tag] = value
    try:
        tracker.begin(live.Description(run.name, project=project, settings=run.config))
        for step in sorted(steps):
            tracker.send(step, steps[step])
        tracker.end(0)
    except Exception as error:  # whatever a service says: the records themselves are safe
        raise ConfigError(
            f"{package} did not take the records of {run.name}: {without_secrets(str(error))}; see its documentation"
        ) from error
    return sum(map(len, steps.values()))
