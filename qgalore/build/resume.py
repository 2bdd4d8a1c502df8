"""The folder of a run, and the checkpoint it goes on from."""

import uuid
from pathlib import Path
from typing import Any

from torch import nn

from .. import checkpoint
from .. import config as configuration
from ..config import Config
from ..errors import ConfigError
from ..lowrank.optimizer import LowRankOptimizer
from ..parallel import ALONE, Team
from ..stats import Records
from .say import say


def run_folder(config: Config, resume: str | None) -> Path:
    """The run's folder. Raises :class:`ConfigError` rather than mix a new run into an old one's files."""
    folder = Path(config.run.dir) / config.run.name
    inside = resume == "auto" or (resume and Path(resume).resolve().parent == (folder / "checkpoints").resolve())
    if not inside and ((folder / "metrics.jsonl").exists() or checkpoint.steps_in(folder / "checkpoints")):
        raise ConfigError(
            f"{folder} already holds a run; continue it with --resume auto or one of its own checkpoints, choose "
            "another run.name, or delete it"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the run folder {folder} cannot be made: {error}; set run.dir") from error
    return folder


def check_shared(folder: Path, team: Team) -> None:
    """Every process writes its share of a checkpoint, so each must see what rank 0 makes in ``folder``. Raises
    :class:`ConfigError` if one of ``team`` does not."""
    if team.size == 1:
        return
    mark = folder / f".{team.of_first('the name of a mark', lambda: uuid.uuid4().hex)}"  # new on every disk
    try:
        if team.leads:
            mark.touch()
        team.meet("a mark in the run's folder")
        if not mark.exists():
            raise ConfigError(
                f"what rank 0 makes in {folder.absolute()} is not there for rank {team.rank}, and all processes of a "
                "job write its checkpoints: set run.dir to a folder on a disk that all machines share"
            )
        team.meet("the mark, seen by all")
    except OSError as error:
        raise ConfigError(f"the run folder {folder} cannot be written: {error}; set run.dir") from error
    finally:
        if team.leads:
            mark.unlink(missing_ok=True)


def checkpoint_to_resume(
    folder: Path, resume: str | None, team: Team = ALONE
) -> tuple[Path | None, dict[str, Any] | None]:
    """The checkpoint meant by ``--resume`` and its state; "auto" names a damaged one and takes the one before it."""
    if resume is None:
        return None, None
    if resume != "auto":
        return Path(resume), checkpoint.read_state(Path(resume), team)
    there = team.of_first("the checkpoints there", lambda: checkpoint.steps_in(folder / "checkpoints"))
    found, saved, complaints = checkpoint.newest_of(there, team)
    for complaint in complaints:
        say("resume", f"skipping a damaged checkpoint: {complaint}")
    if found is None:
        say("resume", f"no usable checkpoint in {folder / 'checkpoints'}; starting from the beginning")
    return found, saved


def check_same_run(source: Path, saved: dict[str, Any], config: Config) -> None:
    different = configuration.differences(saved["config"], config)
    if different:
        listing = "\n".join(f"  {line}" for line in different)
        raise ConfigError(
            f"{source} was made with another configuration:\n{listing}\n"
            f"Only these may change on resume: {', '.join(configuration.RESUMABLE)}"
        )


def check_same_bytes(source: Path | None, saved: dict[str, Any] | None, checksum: str) -> None:
    """Raise :class:`ConfigError` if the tokens on the disk are not those that ``source`` was made with, to the byte."""
    before = (saved or {}).get("data_checksum")
    if before and before != checksum:
        raise ConfigError(
            f"{source} was made with other tokens: the text of data.train, its tokenizer or how it is read has changed "
            "(for a hub dataset set data.max_tokens, which otherwise follows train.max_steps); bring back what the run "
            "began with, or begin a new one under another run.name"
        )


def restore(
    source: Path | None,
    saved: dict[str, Any] | None,
    *,
    folder: Path,
    data: str,
    max_steps: int,
    model: nn.Module,
    optimizer: LowRankOptimizer,
    team: Team = ALONE,
) -> dict[str, Any]:
    """Bring a built run to the state of a checkpoint, its records too, and return its position; None is the beginning.
    In every process of ``team``; the one that leads changes files, when all have read theirs.

    Raises :class:`ConfigError` if it was made with other ``data`` (a description) or lies beyond ``max_steps``.
    """
    step, position = 0, {}
    if source is not None:
        if saved["data"] != data:
            raise ConfigError(
                f"{source} was made with other tokens: the text of data.train, its tokenizer or how much was read "
                "has changed (for a hub dataset set data.max_tokens, which otherwise follows train.max_steps)"
            )
        step = saved["position"]["step"]
        if step > max_steps:
            raise ConfigError(f"{source} is after step {step}, beyond train.max_steps ({max_steps})")
        checkpoint.load_into(source, saved, model, optimizer)
        position = {**saved["position"], "sample": tuple(saved["position"]["sample"])}
        say("resume", f"{source}, after step {step}")
    team.meet("the state of the checkpoint")
    if not team.leads:
        return position
    for path in checkpoint.set_aside(folder / "checkpoints", step) if source is not None else ():
        say("resume", f"a later checkpoint of the course left is kept as {path}")
    for name in ("metrics.jsonl", "subspace.jsonl"):
        Records(folder / name).cut_back(step)
    return position
