"""Held-out loss and perplexity."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import counted
from ..parallel import ALONE, Team


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


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Sequence[Callable[[], dict[str, Tensor]]],
    summed_loss: Callable[[nn.Module, dict[str, Tensor]], Tensor],
    target_tokens: Callable[[dict[str, Tensor]], int],
    device: torch.device,
    team: Team = ALONE,
) -> Evaluation:
    """Token-weighted mean loss over ``batches`` (each a function that makes one), in evaluation mode; each process of
    ``team`` takes its share of them."""
    was_training = model.training
    model.eval()
    total, tokens = 0.0, 0
    for make in team.deal(batches):
        batch = make()
        count = target_tokens(batch)
        if count:
            total += float(summed_loss(model, {name: value.to(device) for name, value in batch.items()}))
            tokens += count
    model.train(was_training)
    total, tokens = team.total("the held-out loss", total), team.total("held-out tokens", tokens)
    return Evaluation(total / max(tokens, 1), tokens)
