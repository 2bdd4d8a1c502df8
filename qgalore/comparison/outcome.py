"""What came out of a comparison: each variant at its best rate, with the spread over seeds and its memory."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median, stdev

from ..convergence import records
from ..convergence.summary import summarise as summary_of
from ..errors import ConfigError
from .grid import Job, Variant

KEPT = ("int8 weights", "weight scales", "bases", "trained in full", "moments", "fp32 masters")


@dataclass(frozen=True)
class Result:
    """A finished run. ``kept``: bytes of weights and optimizer between steps, by the run's plan; ``peak``: planned
    bytes in tensors at the worst moment; both None if the run has left no plan. ``speed``: median tokens/s;
    ``refreshes``: decompositions done, over all layers."""

    job: Job
    loss: float
    steps: int
    tokens: int
    speed: float
    kept: int | None
    peak: int | None
    refreshes: int = 0


@dataclass(frozen=True)
class Summary:
    """A variant at ``rate``, the one of the lowest loss with the first seed. ``losses``: of all seeds there, by seed;
    ``tried``: the loss of every rate with the first seed, nan where that run failed; ``speeds``: tokens/s of those
    runs; ``refreshes``: the seeds' mean."""

    variant: Variant
    rate: str | None
    losses: dict[int, float]
    tried: dict[str | None, float]
    kept: int | None
    peak: int | None
    speeds: tuple[float, ...]
    steps: int = 0
    refreshes: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def loss(self) -> float:
        return mean(self.losses.values())

    @property
    def spread(self) -> float:
        """The standard deviation over seeds (n − 1); 0 for one seed."""
        return _spread(list(self.losses.values()))

    @property
    def speed(self) -> float:
        return median(self.speeds)

    @property
    def speed_spread(self) -> float:
        return _spread(self.speeds)

    def beyond(self, other: "Summary") -> tuple[float, float] | None:
        """How much more its loss is than ``other``'s, seed by seed: mean and standard error (0 for one seed); None if
        no seed has ended in both. Seeds that are hard for both drop out, which ``spread`` has in it."""
        differences = [self.losses[seed] - other.losses[seed] for seed in self.losses.keys() & other.losses.keys()]
        return (mean(differences), _spread(differences) / math.sqrt(len(differences))) if differences else None


def _spread(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def read_result(job: Job, folder: Path) -> Result | None:
    """What ``job`` left in ``folder``; None if it has not ended."""
    try:
        run = records.read_run(folder)
    except ConfigError:
        return None
    if not run.finished:
        return None
    speeds = [value for row in run.train if (value := records.number(row, "tokens_per_second")) is not None]
    kept = peak = None
    try:
        plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        kept = sum(plan["resident"][name] for name in KEPT)
        peak = sum(plan["resident"].values()) + sum(plan["transient"].values())
    except (OSError, ValueError, KeyError):
        pass
    tokens = int(run.train[-1].get("tokens", 0))
    loss = records.number(run.evaluations[-1], "eval_loss")
    layers = summary_of(run).total
    refreshes = layers.done if layers else 0
    return Result(job, loss, run.step, tokens, median(speeds) if speeds else 0.0, kept, peak, refreshes)


def best_rate(variant: Variant, results: list[Result], seed: int) -> str | None:
    """The rate of ``variant`` with the lowest loss at ``seed``. Raises ``ValueError`` if no run with it has ended."""
    mine = [r for r in results if r.job.variant == variant and r.job.seed == seed]
    return min(mine, key=lambda result: result.loss).job.rate


def summarise(variants: list[Variant], results: list[Result], seeds: list[int]) -> list[Summary]:
    """A summary for every variant of which some run with the first seed has ended, the lowest loss first."""
    found = []
    for variant in variants:
        mine = [result for result in results if result.job.variant == variant]
        try:
            rate = best_rate(variant, mine, seeds[0])
        except ValueError:
            continue
        at_best = [result for result in mine if result.job.rate == rate]
        losses = {r.job.rate: r.loss for r in mine if r.job.seed == seeds[0]}
        tried = {one: losses.get(one, math.nan) for one in variant.rates or (None,)}
        first = at_best[0]
        found.append(
            Summary(
                variant,
                rate,
                {result.job.seed: result.loss for result in at_best},
                tried,
                first.kept,
                first.peak,
                tuple(result.speed for result in at_best),
                first.steps,
                mean(result.refreshes for result in at_best),
                _notes(variant, rate, len(at_best), len(seeds)),
            )
        )
    return sorted(found, key=lambda summary: summary.loss)


def _notes(variant: Variant, rate: str | None, runs: int, seeds: int) -> list[str]:
    notes = []
    ordered = sorted(variant.rates, key=float)
    if len(ordered) > 1 and rate in (ordered[0], ordered[-1]):
        notes.append("best rate at the edge of those tried")
    if runs < seeds:
        notes.append(f"{runs} of {seeds} seeds")
    return notes


def front(summaries: list[Summary], cost: Callable[[Summary], float | None]) -> list[Summary]:
    """Those that no other beats in ``cost`` and loss at once, the cheapest first; without a cost: left out."""
    known = sorted((s for s in summaries if cost(s) is not None), key=lambda s: (cost(s), s.loss))
    found: list[Summary] = []
    for summary in known:
        if not found or summary.loss < found[-1].loss:
            found.append(summary)
    return found
