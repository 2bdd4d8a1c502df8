"""The folder of a run, and the checkpoint it goes on from."""

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


def checkpoint_to_resume(folder: Path, resume: str | None) -> tuple[Path | None, dict[str, Any] | None]:
    """The checkpoint meant by ``--resume`` and its state; "auto" names a damaged one and takes the one before it."""
    if resume is None:
        return None, None
    if resume != "auto":
        return Path(resume), checkpoint.read_state(Path(resume))
    found, saved, complaints = checkpoint.newest_of(checkpoint.steps_in(folder / "checkpoints"))
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
