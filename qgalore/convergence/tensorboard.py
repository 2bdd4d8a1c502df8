"""The records as TensorBoard scalars; the package ``tensorboard`` is only needed here."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

from ..errors import ConfigError
from . import live
from .records import Row, Run, number

UPDATES = ("update_rms", "weight_rms", "momentum_cosine")
PER_LAYER = ("similarity", "energy", "energy_before", "gap")
TRAIN = ("loss", "lr", "grad_norm", "tokens_per_second", "memory_bytes", "step_seconds", "refresh_seconds")
EVALUATION, DRAWN = "eval_", "drawn/"  # how the keys of held-out figures begin, and those of samples by source
HEALTH = tuple(f"moment{n}_{what}" for n in (1, 2) for what in ("zero", "saturated"))
HEALTH += ("int8_changed", "int8_rescaled", "int8_noise_share")


def scalars(run: Run) -> Iterator[tuple[str, float, int]]:
    return of_rows([*run.train, *run.evaluations], run.refreshes, run.updates)


def of_rows(
    metrics: Sequence[Row], refreshes: Sequence[Row], updates: Sequence[Row]
) -> Iterator[tuple[str, float, int]]:
    """(tag, value, step) of rows of metrics.jsonl, subspace.jsonl and updates.jsonl: ``train/…``, ``held_out/…``,
    ``drawn/…``, ``KEY/LAYER`` for the figures of a layer's refresh or update, and ``health/…``, the mean over the
    layers refreshed in a step. All refreshes of a step come together."""
    for row in metrics:
        known = {f"train/{key}": key for key in TRAIN}
        known |= {f"held_out/{key}": key for key in row if key.startswith(EVALUATION)}
        known |= {key: key for key in row if key.startswith(DRAWN)}
        yield from ((tag, value, row["step"]) for tag, key in known.items() if (value := number(row, key)) is not None)
    means: dict[tuple[str, int], list[float]] = {}
    for row in refreshes:
        for key in (*PER_LAYER, *HEALTH):
            value = number(row, key)
            if value is None:
                continue
            if key in PER_LAYER:
                yield f"{key}/{row['layer']}", value, row["step"]
            else:
                means.setdefault((key, row["step"]), []).append(value)
    for row in updates:
        known = ((key, number(row, key)) for key in UPDATES)
        yield from ((f"{key}/{row['layer']}", value, row["step"]) for key, value in known if value is not None)
    for (key, step), values in means.items():
        yield f"health/{key}", fmean(values), step


def inside(name: str) -> str:
    """A run's name as a folder's name: one that is a path would lead out of the folder that was asked for."""
    return re.sub(r"[^\w.+-]+", "-", name).strip("-.") or "run"


def write(run: Run, folder: Path) -> int:
    """Write an event file under ``folder`` / the run's name; returns the number of scalars. Raises
    :class:`ConfigError`."""
    package = live.imported("torch.utils.tensorboard", "--tensorboard")
    count = 0
    try:
        with package.SummaryWriter(str(folder / inside(run.name))) as writer:
            for tag, value, step in scalars(run):
                writer.add_scalar(tag, value, step)
                count += 1
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error}; choose another folder") from error
    return count
