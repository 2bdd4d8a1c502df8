"""Held-out loss and perplexity."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import counted
from ..parallel import ALONE, Team

Run = Callable[[], Tensor]  # the loss of one batch, a scalar
Losses = Callable[[Iterable[Run]], Iterator[Tensor]]  # of all, in their order


@dataclass(frozen=True)
class Evaluation:
    """``loss``: mean over ``tokens`` target tokens, in nats; ``perplexity``: its exponential."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def row(self) -> dict[str, Any]:
        """For metrics.jsonl."""
        return {"eval_loss": self.loss, "eval_perplexity": self.perplexity}

    def __str__(self) -> str:
        return f"held-out loss {self.loss:.4f} | perplexity {self.perplexity:.2f} ({counted(self.tokens, 'token')})"


def one_by_one(runs: Iterable[Run]) -> Iterator[Tensor]:
    """The losses of ``runs``, each of which ends before the next one begins."""
    for run in runs:
        yield run()


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Sequence[Callable[[], dict[str, Tensor]]],
    summed_loss: Callable[[nn.Module, dict[str, Tensor]], Tensor],
    target_tokens: Callable[[dict[str, Tensor]], int],
    device: torch.device,
    team: Team = ALONE,
    losses: Losses = one_by_one,
) -> Evaluation:
    """Token-weighted mean loss over ``batches`` (each a function that makes one), in evaluation mode; each process of
    ``team`` takes its share of them. ``losses``: how a model is run on several batches."""
    was_training, tokens = model.training, 0

    def loss_of(batch: dict[str, Tensor]) -> Tensor:
        return summed_loss(model, {name: value.to(device) for name, value in batch.items()})

    def runs() -> Iterator[Run]:
        nonlocal tokens
        for make in team.deal(batches):
            batch = make()
            if count := target_tokens(batch):
                tokens += count
                yield partial(loss_of, batch)

    model.eval()
    total = sum(map(float, losses(runs())), 0.0)
    model.train(was_training)
    total, tokens = team.total("the held-out loss", total), team.total("held-out tokens", tokens)
    return Evaluation(total / max(tokens, 1), tokens)
