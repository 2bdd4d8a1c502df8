"""How a run starts: from nothing, from where it was stopped, or anew on the weights of another run's checkpoint."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..config import Config
from ..lowrank.optimizer import LowRankOptimizer
from ..parallel import Team
from . import restart
from .position import Position
from .resume import check_same_bytes, check_same_run, checkpoint_to_resume, restore


@dataclass(frozen=True)
class Start:
    """The checkpoint that a run starts from (None: from nothing), its state, whether it begins ``anew`` on it, and the
    ``tokenizer`` that comes with it, if the run takes that one."""

    source: Path | None
    saved: dict[str, Any] | None
    anew: bool
    tokenizer: Path | None = None

    @property
    def past(self) -> dict[str, Any] | None:
        """The state that the run goes on from; None where it begins."""
        return None if self.anew else self.saved

    def check_tokens(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise :class:`ConfigError` if a run that begins anew has other tokens than the run before."""
        if self.anew and self.source is not None:
            restart.check_tokens(self.source, tokenizer)

    def check_bytes(self, checksum: str) -> None:
        """Raise :class:`ConfigError` if the run goes on, and its tokens are others than before."""
        check_same_bytes(self.source, self.past, checksum)

    def position(self, *, model: nn.Module, optimizer: LowRankOptimizer, team: Team, **where: Any) -> Position:
        """Fill ``model`` and ``optimizer``, and return where the run is. ``where``: as for :func:`.resume.restore`."""
        if self.anew and self.source is not None and self.saved is not None:
            return restart.take(self.source, self.saved, model, optimizer, team)
        return restore(self.source, self.saved, model=model, optimizer=optimizer, team=team, **where)


def decide(config: Config, folder: Path, resume: str | None, team: Team) -> tuple[Config, Start]:
    """``config`` as the run in ``folder`` starts with it, and how. ``resume``: None, "auto" or a checkpoint. Raises
    :class:`ConfigError` if they do not go together."""
    source, saved = checkpoint_to_resume(folder, resume, team)
    if source is None or saved is None:
        return config, Start(None, None, False)
    anew = restart.begins(config, folder, resume)
    if anew:
        restart.check(source, saved, config)
    else:
        config = check_same_run(source, saved, restart.as_before(source, saved, config))
    return config, Start(source, saved, anew, restart.tokenizer_of(source, config))
