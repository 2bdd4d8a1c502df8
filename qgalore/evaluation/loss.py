"""Held-out loss and perplexity."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import counted
from ..parallel import ALONE, Team

Batches = Sequence[Callable[[], dict[str, Tensor]]]  # each a function that makes one
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
        figure = f"{self.perplexity:.2f}" if self.perplexity < 1e6 else f"{self.perplexity:.2e}"
        return f"held-out loss {self.loss:.4f} | perplexity {figure} ({counted(self.tokens, 'token')})"


@dataclass(frozen=True)
class NamedEvaluations(Evaluation):
    """Of several held-out sets: ``loss`` and ``perplexity`` over the tokens of all, and ``sets``, of each by name."""

    sets: dict[str, Evaluation]

    def row(self) -> dict[str, Any]:
        """For metrics.jsonl."""
        return {**super().row(), **{f"eval_loss/{name}": one.loss for name, one in self.sets.items()}}

    def __str__(self) -> str:
        return f"{super().__str__()} | {', '.join(f'{name} {one.loss:.4f}' for name, one in self.sets.items())}"


def together(sets: Mapping[str, Evaluation]) -> Evaluation:
    """The evaluations of ``sets``, of which a single one may have no name (""), as one: every token weighs the same, as
    in one set that holds them all."""
    if list(sets) == [""]:
        return sets[""]
    tokens = sum(one.tokens for one in sets.values())
    total = sum(one.loss * one.tokens for one in sets.values())
    return NamedEvaluations(total / max(tokens, 1), tokens, dict(sets))


def one_by_one(runs: Iterable[Run]) -> Iterator[Tensor]:
    """The losses of ``runs``, each of which ends before the next one begins."""
    for run in runs:
        yield run()


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Batches,
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


def evaluate_sets(model: nn.Module, sets: Mapping[str, Batches], **how: Any) -> Evaluation:
    """:func:`evaluate` of each of the named ``sets``, ``how`` being its other arguments, and all :func:`together`."""
    return together({name: evaluate(model, batches, **how) for name, batches in sets.items()})
