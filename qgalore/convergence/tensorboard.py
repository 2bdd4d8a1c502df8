"""The records as TensorBoard scalars; the package ``tensorboard`` is only needed here."""

import re
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

from ..errors import ConfigError
from .records import OF_SET, Run, number

UPDATES = ("update_rms", "weight_rms", "momentum_cosine")
PER_LAYER = ("similarity", "energy", "energy_before", "gap")
TRAIN = ("loss", "lr", "grad_norm", "tokens_per_second", "memory_bytes", "step_seconds", "refresh_seconds")
EVALUATION = ("eval_loss", "eval_perplexity")
HEALTH = tuple(f"moment{n}_{what}" for n in (1, 2) for what in ("zero", "saturated"))
HEALTH += ("int8_changed", "int8_rescaled", "int8_noise_share")


def scalars(run: Run) -> Iterator[tuple[str, float, int]]:
    """(tag, value, step): ``train/…``, ``held_out/…``, ``KEY/LAYER`` for the figures of a layer's refresh or update,
    and ``health/…``, the mean over the layers refreshed in a step."""
    evaluation = (*EVALUATION, *(f"{OF_SET}{name}" for name in run.held_out_sets))
    for section, rows, keys in (("train", run.train, TRAIN), ("held_out", run.evaluations, evaluation)):
        for row in rows:
            yield from ((f"{section}/{k}", value, row["step"]) for k in keys if (value := number(row, k)) is not None)
    for row in run.evaluations:  # the samples that each of several sources has given
        yield from (
            (key, value, row["step"])
            for key in row
            if key.startswith("drawn/") and (value := number(row, key)) is not None
        )
    means: dict[tuple[str, int], list[float]] = {}
    for row in run.refreshes:
        for key in (*PER_LAYER, *HEALTH):
            value = number(row, key)
            if value is None:
                continue
            if key in PER_LAYER:
                yield f"{key}/{row['layer']}", value, row["step"]
            else:
                means.setdefault((key, row["step"]), []).append(value)
    for row in run.updates:
        known = ((key, number(row, key)) for key in UPDATES)
        yield from ((f"{key}/{row['layer']}", value, row["step"]) for key, value in known if value is not None)
    for (key, step), values in means.items():
        yield f"health/{key}", fmean(values), step


def inside(name: str) -> str:
    """A run's name as a folder's name: one that is a path would lead out of the folder that was asked for."""
    return re.sub(r"[^\w.+-]+", "-", name).strip("-.") or "run"


def write(run: Run, folder: Path) -> int:
    """Write an event file under ``folder`` / the run's name; returns the number of scalars.

    Raises :class:`ConfigError` if ``tensorboard`` is not installed or the folder cannot be written.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "--tensorboard needs the package tensorboard, which cannot be imported "
            f"({error}); install it with pip install 'qgalore[tracking]' or leave the option out"
        ) from error
    count = 0
    try:
        with SummaryWriter(str(folder / inside(run.name))) as writer:
            for tag, value, step in scalars(run):
                writer.add_scalar(tag, value, step)
                count += 1
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error}; choose another folder") from error
    return count
