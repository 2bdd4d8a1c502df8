"""The folder of a run, and the checkpoint it goes on from."""

import json
import math
import uuid
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from .. import config as configuration
from ..config import Config
from ..convergence.records import held_out, read_run
from ..data.paths import make_folder
from ..errors import ConfigError
from ..files import atomic, checkpoint
from ..lowrank.optimizer import LowRankOptimizer
from ..parallel import ALONE, Team
from . import origins
from .export import KEPT, keep_beside
from .position import Position
from .records import Records
from .restart import KEY, check_asked, refused, saved_config
from .run_lock import RunLock
from .say import say


def enter(config: Config, resume: str | None, team: Team = ALONE) -> tuple[Path, RunLock | None]:
    """The run's folder, made and locked against other processes, and the lock, which is to be kept: rank 0 of ``team``
    holds it for all. Raises :class:`ConfigError` rather than mix a new run into an old one's files."""
    lock: list[RunLock] = []

    def claim() -> Path:
        folder = Path(config.run.dir) / config.run.name
        check_asked(config, folder, resume)
        _check_meant(folder, resume)
        try:
            made = make_folder(folder)
        except OSError as error:
            raise ConfigError(f"the run folder {folder} cannot be made: {error}; set run.dir") from error
        lock.append(RunLock(folder, made))
        holds_one = (folder / "metrics.jsonl").exists() or checkpoint.steps_in(folder / "checkpoints")
        if resume != "auto" and not _is_own(folder, resume) and holds_one:
            raise ConfigError(
                f"{folder} already holds a run; continue it with --resume auto or one of its own checkpoints, choose "
                "another run.name, or delete it"
            )
        if lock[0].works:
            atomic.sweep(folder)
        return folder

    folder = team.of_first("the run's folder", claim)
    check_shared(folder, team)
    return folder, lock[0] if lock else None


def _is_own(folder: Path, resume: str | None) -> bool:
    return resume is not None and Path(resume).resolve().parent == (folder / "checkpoints").resolve()


def _check_meant(folder: Path, resume: str | None) -> None:
    """Raise :class:`ConfigError` for a ``--resume PATH`` that is no checkpoint to go on from."""
    if resume in (None, "auto"):
        return
    path = Path(resume)
    if (path / "checkpoints").is_dir():
        found = checkpoint.steps_in(path / "checkpoints")
        example = found[-1] if found else path / "checkpoints" / checkpoint.name_for(100)
        raise ConfigError(
            f"--resume {resume} is a run's folder, not a checkpoint; give auto to continue run.name, or a checkpoint "
            f"such as {example}"
        )
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise ConfigError(f"--resume {resume} {what}; give auto, or a checkpoint's folder: RUN/checkpoints/step-…")
    if _is_own(folder, resume) and checkpoint.step_of(path.resolve()) is None:
        raise ConfigError(
            f"--resume {resume} does not have the name of a checkpoint of this run's present course; to go on from it, "
            "set another run.name"
        )


def check_shared(folder: Path, team: Team) -> None:
    """Raise :class:`ConfigError` if a process of ``team`` does not see what rank 0 makes in ``folder``: each writes
    there."""
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
    """The checkpoint meant by ``--resume`` and its state; "auto" names a damaged one and takes the one before it.
    Raises :class:`ConfigError` where "auto" can use none of those that are there, or a newer version wrote one: a run
    that began again beside them would leave days of work behind without being asked."""
    if resume is None:
        return None, None
    if resume != "auto":
        return Path(resume), checkpoint.read_state(Path(resume), team)
    place = folder / "checkpoints"
    there = team.of_first("the checkpoints there", lambda: checkpoint.steps_in(place))
    found, saved, complaints = checkpoint.newest_of(there, team)
    newer = [complaint for complaint in complaints if isinstance(complaint, checkpoint.NewerError)]
    if newer and found is not None:
        raise ConfigError(f"{newer[0]}, or go back to an older one with --resume {found}")
    if complaints and found is None:
        reasons = "".join(f"\n  {complaint}" for complaint in complaints)
        raise ConfigError(
            f"none of the {len(complaints)} checkpoints in {place} can be used, and a run does not begin again beside "
            f"them:{reasons}\nTo begin anew, choose another run.name, or move {place} away and say --resume auto"
        )
    for complaint in complaints:
        say("resume", f"skipping a damaged checkpoint: {complaint}")
    if found is None:
        say("resume", f"no checkpoint in {place}; starting from the beginning")
    return found, saved


def _attend_as_before(config: Config, saved: dict[str, Any]) -> Config:
    """``config`` with the attention of the run that goes on, if it leaves that to us: another one would round
    otherwise. Runs made before ``model.attention`` was a key kept documents apart by a mask."""
    attention = saved["config"]["model"].get("attention", "sdpa")
    if config.model.attention != "auto" or attention not in ("sdpa", "eager", "flex"):
        return config
    say("resume", f"model.attention={attention}, as the run has it; a new run may have auto")
    return config.model_copy(update={"model": config.model.model_copy(update={"attention": attention})})


def check_same_run(source: Path, saved: dict[str, Any], config: Config) -> Config:
    """``config`` as the run of a checkpoint goes on with it. Raises :class:`ConfigError` if it is not that run's."""
    before = saved_config(source, saved)
    config = _attend_as_before(config, saved)
    different = configuration.differences(before, config)
    if different:
        listing = "\n".join(f"  {line}" for line in different)
        anew = ""
        if not refused(config, different):
            anew = (
                f"\nA new run may begin on its state with all of these: {KEY}=true, another run.name, --resume {source}"
            )
        raise ConfigError(
            f"{source} was made with another configuration:\n{listing}\n"
            f"Only these may change on resume: {', '.join(configuration.RESUMABLE)}{anew}"
        )
    return config


def _position(source: Path, saved: dict[str, Any]) -> Position:
    """Where the run was. Raises :class:`ConfigError` if that is not a position, or not that of the folder's name."""
    try:
        position = Position.read(saved.get("position", {}))
    except ValueError as error:
        raise ConfigError(f"{source} cannot be used: its state.json says that {error}") from error
    named = checkpoint.step_of(source)
    if named is not None and named != position.step:
        raise ConfigError(
            f"{source} holds the state after step {position.step}: it was renamed. Give it its own name, "
            f"{checkpoint.name_for(position.step)}, or move it away"
        )
    if saved["optimizer"]["step_count"] != position.step + position.steps_before:
        raise ConfigError(f"{source} cannot be used: its optimizer and its position are after different steps")
    return position


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
) -> Position:
    """Bring a built run to the state of a checkpoint, its records too, and return its position; None is the beginning.
    In every process of ``team``; the one that leads changes files, when all have read theirs. Raises
    :class:`ConfigError`."""
    position = Position()
    if source is not None:
        if saved.get("data") != data:
            raise ConfigError(
                f"{source} was made with other tokens: the text of data.train, its tokenizer or how much was read "
                "has changed (for a hub dataset set data.max_tokens, which otherwise follows train.max_steps)"
            )
        position = _position(source, saved)
        if position.step > max_steps:
            raise ConfigError(
                f"{source} is after step {position.step}, beyond the run's last, {max_steps}; raise train.max_steps or "
                "train.epochs"
            )
        checkpoint.load_into(source, saved, model, optimizer)
        say("resume", f"{source}, after step {position.step}")
    team.meet("the state of the checkpoint")
    if not team.leads:
        return position
    for path in checkpoint.set_aside(folder / "checkpoints", position.step) if source is not None else ():
        say("resume", f"a later checkpoint of the course left is kept as {path}")
    for name in ("metrics.jsonl", "subspace.jsonl", "updates.jsonl"):
        Records(folder / name).cut_back(position.step)
    return position


def describe(
    folder: Path,
    config: Config,
    plan: dict[str, Any],
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    team: Team = ALONE,
) -> None:
    """Write what the run is made of into its folder, each file whole or not at all. One process of ``team`` does so."""
    if not team.leads:
        return
    with atomic.explained(f"the run folder {folder}", "Free space or set run.dir, then go on with --resume auto"):
        atomic.write_text(folder / "config.yaml", configuration.dump(config))
        atomic.write_text(folder / "plan.json", json.dumps(plan, indent=1))
        atomic.write_text(folder / origins.NAME, json.dumps(origins.of(config), indent=1))
        with atomic.replacing_folder(folder / KEPT) as fresh:
            keep_beside(config, model, tokenizer, fresh)


def ending(config: Config, result: Any, position: Position, folder: Path) -> str:
    """What the last line of the run in ``folder`` says of its ``result``, the last evaluation: with ``export.which:
    best`` first of all the loss of the weights that were exported, and that the run did harm if all losses say so."""
    said = str(result)
    if config.export.which == "best" and position.best_step is not None:
        said = (
            f"the exported weights are the best, of step {position.best_step} with held-out loss "
            f"{position.best_loss:.4f} (the last: {result})"
        )
    losses = dict(held_out(read_run(folder)).get("", ()))
    before = losses.pop(0, math.inf)
    if losses and min(losses.values()) > before:
        said += (
            f"; all held-out losses since are above the {before:.4f} before step 1, so the run made the model worse: "
            "lower train.lr, or look at the data"
        )
    return said
