"""A new schedule, or new data, on a checkpoint's weights: ``--resume PATH train.restart_schedule=true``.

Weights, moments, bases and the schedules of their refreshes come from PATH, and with them the optimizer's count of
steps. By it refreshes fall due, and its random bits are drawn, so that both go on and no bits are used again. The
position in the data, in the learning rate and among the evaluations begins at 0 in a new run. That run is resumed like
any other: its own checkpoints hold how many steps the optimizer had taken before.
"""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from .. import config as configuration
from ..config import Config
from ..data.tokenizer import load_tokenizer
from ..errors import ConfigError, counted
from ..files import checkpoint
from ..lowrank.optimizer import LowRankOptimizer
from ..parallel import ALONE, Team
from .export import KEPT
from .position import Position
from .say import say

KEY = "train.restart_schedule"
# What decides about the tensors of a checkpoint, or about what their values mean. All else may change.
_STAYS = (
    "method", "model", "data.task", "data.label_type", "data.added_tokens", "train.optimizer",
    "train.optimizer_options", "lowrank",
)  # fmt: skip
# Among these, what changes no tensor's name, shape or format. Overrides that would are found when tensors are read.
_FREE = ("model.overrides", "model.attention", "model.compile", "model.compute", "lowrank.grad_dtype")
# Rules whose state is read with random numbers that follow from the seed.
_SEEDED = ("apollo", "apollo_mini", "muon")


def check_asked(config: Config, folder: Path, resume: str | None) -> None:
    """Raise :class:`ConfigError` if a restart is asked for without a checkpoint to begin or to go on from."""
    if not config.train.restart_schedule or resume not in (None, "auto"):
        return
    if resume is None:
        raise ConfigError(
            f"{KEY} is true, and there is no checkpoint to begin from; add --resume RUN/checkpoints/step-…, of another "
            "run"
        )
    own = folder / "checkpoints"
    if not checkpoint.steps_in(own):
        there = f"Delete {folder}, and say" if folder.exists() else "Say"
        raise ConfigError(
            f"{KEY} is true, and {own} holds no checkpoint to go on from. {there} --resume RUN/checkpoints/step-…, of "
            "another run, instead of auto"
        )


def refused(config: Config, lines: list[str]) -> list[str]:
    """Those of ``lines``, what :func:`configuration.differences` found, with which no restart may begin."""
    seeded = config.lowrank.rule in _SEEDED
    return [line for line in lines if _stays(line.partition(":")[0], seeded)]


def begins(config: Config, folder: Path, resume: str | None) -> bool:
    """Whether this start begins a run on another's checkpoint, and does not go on with what ``folder``, its own,
    holds."""
    if not config.train.restart_schedule or resume in (None, "auto"):
        return False
    return Path(resume).resolve().parent != (folder / "checkpoints").resolve()


def saved_config(source: Path, saved: dict[str, Any]) -> dict[str, Any]:
    """The configuration in the state of a checkpoint. Raises :class:`ConfigError` if it is none."""
    before = saved.get("config", {})
    if not all(isinstance(before.get(section), dict) for section in ("run", "model", "data", "train", "lowrank")):
        raise ConfigError(f"{source} cannot be used: its state.json does not say what configuration it was made with")
    return before


def as_before(source: Path, saved: dict[str, Any], config: Config) -> Config:
    """``config`` for going on with the checkpoint ``source``; that its run began on another's weights need not be said
    again. Raises :class:`ConfigError` if its own checkpoint should begin it anew."""
    before = saved_config(source, saved)
    restarted = before["train"].get("restart_schedule", False)
    if config.train.restart_schedule and not restarted:
        raise ConfigError(
            f"{KEY} is true, and {source} is this run's own checkpoint, which it goes on from; choose another run.name "
            f"and say --resume {source}"
        )
    if not restarted:
        return config
    return config.model_copy(update={"train": config.train.model_copy(update={"restart_schedule": True})})


def check(source: Path, saved: dict[str, Any], config: Config) -> None:
    """Say in what ``config``, for a run that begins on the checkpoint ``source``, differs from that of the run before.
    Raises :class:`ConfigError` for a difference that changes the model's tensors, or what they mean."""
    before = saved_config(source, saved)
    different = configuration.differences(before, config)
    if staying := refused(config, different):
        listing = "\n".join(f"  {line}" for line in staying)
        raise ConfigError(
            f"{source} was made with another configuration:\n{listing}\nWith {KEY} the data, the learning rate, the "
            "batch and all that is not about the checkpoint's tensors may change. Leave these keys as they were, or "
            "begin from the run's export with model.path, which takes the weights alone"
        )
    for line in different:
        if not line.startswith(KEY):
            idle = line.startswith("data.vocab_size:")
            say("restart", f"{line}, which has no effect, as the tokenizer stays" if idle else line)


def _stays(key: str, seeded: bool) -> bool:
    def inside(names: tuple[str, ...]) -> bool:
        return any(key == name or key.startswith(f"{name}.") for name in names)

    return (inside(_STAYS) and not inside(_FREE)) or (seeded and key == "run.seed")


def _kept(source: Path) -> Path:
    return source.resolve().parent.parent / KEPT


def tokenizer_of(source: Path, config: Config) -> Path | None:
    """The tokenizer of the run that made ``source``, if none is named: one trained on new data would give ids another
    meaning. Raises :class:`ConfigError` if it is gone."""
    if not config.train.restart_schedule or config.data.tokenizer is not None or config.model.path is not None:
        return None
    if not (kept := _kept(source)).is_dir():
        raise ConfigError(f"{source} comes without the tokenizer of its run, {kept}; name it as data.tokenizer")
    return kept


def check_tokens(source: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise :class:`ConfigError` if ``tokenizer`` gives other ids than that of the run that made ``source``."""
    kept = _kept(source)
    if not kept.is_dir():
        say("restart", f"{kept} is gone, so nothing tells whether the tokenizer is that of the run before")
        return
    before, now = load_tokenizer(str(kept)).get_vocab(), tokenizer.get_vocab()
    if other := [token for token in {**before, **now} if before.get(token) != now.get(token)]:
        raise ConfigError(
            f"the tokenizer is not that of the run that made {source}: {counted(len(other), 'entry', 'entries')} "
            f"differ, for example {other[0]!r}, whose id was {before.get(other[0])} and is {now.get(other[0])}. Leave "
            f"data.tokenizer out, or set it to {kept}"
        )


def take(
    source: Path, saved: dict[str, Any], model: nn.Module, optimizer: LowRankOptimizer, team: Team = ALONE
) -> Position:
    """Fill ``model`` and ``optimizer`` from a checkpoint and return the position of a new run on them, with its own
    rates."""
    rates = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    checkpoint.load_into(source, saved, model, optimizer)
    for group, (lr, decay) in zip(optimizer.param_groups, rates, strict=True):
        group["lr"], group["weight_decay"] = lr, decay
    steps = optimizer.step_count
    say("restart", f"taken from {source}: weights, moments, bases and their schedules, after {counted(steps, 'step')}")
    say("restart", "new from step 0: the learning rate with its warm-up, the data and its order, losses and the best")
    team.meet("the state of the checkpoint")
    return Position(steps_before=steps)
