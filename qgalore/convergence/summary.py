"""What a run's refresh records say, by layer, by kind of layer and in all."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, median
from typing import Any

from ..lowrank.subspace.schedule import LazySchedule
from ..schedule_defaults import longest_gap
from .records import Row, Run, held_out, number

LAST_LOSSES = 10  # train losses averaged for the summary: one batch's loss says little


@dataclass(frozen=True)
class LayerSummary:
    """One layer, or several of one kind together (``layers`` of them). None: not recorded.

    ``fixed``: refreshes that a schedule of fixed gaps would have made; ``energy`` and ``energy_before`` the gradient's
    in the new basis and in the old one, at the last refresh; ``settled`` how many layers have a gap grown to its limit
    (``at_limit`` of them) or a last similarity at the threshold; ``saved_seconds`` the refreshes skipped at the mean
    price of those done.
    """

    name: str
    kind: str
    layers: int
    shape: tuple[int, int] | None
    rank: int | None
    done: int
    fixed: int | None
    failed: int
    gap: float | None
    similarity: float | None
    energy: float | None
    energy_before: float | None
    settled: int | None
    at_limit: int
    seconds: float
    saved_seconds: float | None

    @property
    def skipped(self) -> int | None:
        return None if self.fixed is None else max(0, self.fixed - self.done)


@dataclass(frozen=True)
class RunSummary:
    """A run in one line. ``loss`` is the mean of the last ``LAST_LOSSES`` train losses, ``share`` that of step time
    spent in refreshes, ``tokens_per_second`` the median over steps."""

    run: Run
    loss: float | None
    held_out: float | None
    tokens_per_second: float | None
    share: float | None
    layers: list[LayerSummary]
    total: LayerSummary | None
    held_out_sets: dict[str, float] = field(default_factory=dict)


def kind_of(layer: str) -> str:
    """``model.layers.3.self_attn.q_proj`` → ``self_attn.q_proj``: the name after its last index, or its last part. A
    mixture's experts are of one kind: ``…3.mlp.experts.down_proj.7`` → ``mlp.experts.down_proj``."""
    layer = re.sub(r"(experts\..*)\.\d+$", r"\1", layer)
    return re.split(r"(?:^|\.)\d+\.", layer)[-1] if re.search(r"(?:^|\.)\d+\.", layer) else layer.split(".")[-1]


def by_layer(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows of each layer; layers of one kind together, in the order of the model: the first bases of all layers
    are found as gradients arrive, from the last layer to the first."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["layer"], []).append(row)
    kinds = list(dict.fromkeys(kind_of(layer) for layer in found))[::-1]
    indices = {layer: tuple(int(part) for part in re.findall(r"\d+", layer)) for layer in found}
    return dict(sorted(found.items(), key=lambda item: (kinds.index(kind_of(item[0])), indices[item[0]])))


def shape_of(row: Row) -> tuple[int, int] | None:
    shape = row.get("shape")
    return tuple(shape) if isinstance(shape, list) and len(shape) == 2 else None


def _last(rows: list[Row], key: str) -> float | None:
    return next((value for row in reversed(rows) if (value := number(row, key)) is not None), None)


def _decided(rows: list[Row]) -> list[Row]:
    """Rows of refreshes that took place: failures keep the old basis, unless there was none."""
    return [row for row in rows if row.get("failed") is None or number(row, "energy") is not None]


def _schedule(rows: list[Row]) -> LazySchedule | None:
    """The layer's schedule before any gap grew, read from its first refresh. ``next_refresh`` counts from 0."""
    for row in _decided(rows)[:1]:
        gap, following = number(row, "gap"), number(row, "next_refresh")
        if row.get("first") and gap and following is not None:
            return LazySchedule(base_gap=int(gap), first_gap=int(following) - row["step"] + 1)
    return None


def summarise_layer(run: Run, layer: str, rows: list[Row]) -> LayerSummary:
    done = _decided(rows)
    schedule = _schedule(rows)
    fixed = None if schedule is None else schedule.fixed_refreshes(run.step)
    costs = [seconds for row in done if (seconds := number(row, "seconds")) is not None]
    typical = [number(row, "seconds") or 0.0 for row in done if not row.get("first")] or costs
    similarity, gap = _last(done, "similarity"), _last(rows, "gap")
    threshold, limit = run.setting("lowrank", "cos_threshold"), run.setting("lowrank", "max_gap")
    if limit is None and schedule is not None:
        limit = longest_gap(schedule.base_gap)
    grown = None not in (schedule, gap, limit) and gap > schedule.base_gap
    at_limit = bool(grown and gap >= limit)
    similar = similarity is not None and isinstance(threshold, (int, float)) and similarity >= threshold
    rank = number(rows[-1], "rank")
    return LayerSummary(
        name=layer,
        kind=kind_of(layer),
        layers=1,
        shape=shape_of(rows[-1]),
        rank=None if rank is None else int(rank),
        done=len(done),
        fixed=fixed,
        failed=len(rows) - len(done),
        gap=gap,
        similarity=similarity,
        energy=_last(done, "energy"),
        energy_before=_last(done, "energy_before"),
        settled=None if similarity is None or threshold is None else int(at_limit or similar),
        at_limit=int(at_limit),
        seconds=sum(number(row, "seconds") or 0.0 for row in rows),
        saved_seconds=None if fixed is None or not typical else max(0, fixed - len(done)) * fmean(typical),
    )


Rule = Callable[[list], Any]


def combined(layers: Sequence[Any], rules: Mapping[str, Rule]) -> dict[str, Any]:
    """Each figure of several layers by its rule, from those that have it; None if none has."""
    known = {key: [value for layer in layers if (value := getattr(layer, key)) is not None] for key in rules}
    return {key: rules[key](values) if values else None for key, values in known.items()}


def the_same(values: list) -> Any:
    """What all of ``values`` are, or None."""
    return values[0] if len(set(values)) == 1 else None


def together(name: str, layers: list[LayerSummary]) -> LayerSummary:
    """Several layers as one: counts and seconds added, gap the median, the other figures averaged."""
    rules: dict[str, Rule] = {"shape": the_same, "rank": lambda ranks: round(fmean(ranks)), "gap": median}
    rules |= dict.fromkeys(("done", "fixed", "failed", "settled", "at_limit", "seconds", "saved_seconds"), sum)
    rules |= dict.fromkeys(("similarity", "energy", "energy_before"), fmean)
    return replace(layers[0], name=name, kind=name, layers=len(layers), **combined(layers, rules))


def by_kind(layers: Iterable[LayerSummary]) -> dict[str, list[LayerSummary]]:
    groups: dict[str, list[LayerSummary]] = {}
    for layer in layers:
        groups.setdefault(layer.kind, []).append(layer)
    return groups


def step_times(run: Run) -> list[tuple[int, float]]:
    """(step, seconds) of the steps that were taken; from tokens and their rate where the row does not say."""
    found, before = [], 0.0
    for row in run.train:
        tokens, rate = number(row, "tokens") or before, number(row, "tokens_per_second")
        seconds = number(row, "step_seconds") or ((tokens - before) / rate if rate else None)
        before = tokens
        if seconds:
            found.append((row["step"], seconds))
    return found


def summarise(run: Run) -> RunSummary:
    layers = [summarise_layer(run, layer, rows) for layer, rows in by_layer(run.refreshes).items()]
    total = together("total", layers) if layers else None
    losses = [loss for row in run.train if (loss := number(row, "loss")) is not None]
    rates = [rate for row in run.train if (rate := number(row, "tokens_per_second"))]
    seconds = sum(spent for _, spent in step_times(run))
    return RunSummary(
        run=run,
        loss=fmean(losses[-LAST_LOSSES:]) if losses else None,
        held_out=_last(run.evaluations, "eval_loss"),
        tokens_per_second=median(rates) if rates else None,
        share=total.seconds / seconds if total and seconds else None,
        layers=layers,
        total=total,
        held_out_sets={name: points[-1][1] for name, points in held_out(run).items() if name},
    )
