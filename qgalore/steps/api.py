"""The layer-major step in one call, for a training loop of one's own."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..lowrank.optimizer import LowRankOptimizer
from ..parallel import Team
from . import walk
from .activations import Activations
from .blocks import NotWalkableError, Run
from .reducing import Steps
from .trial import Loss, Trial, try_walk
from .turns import AlwaysThere, Turns, gathered


@dataclass(frozen=True)
class Taken:
    """What a step did. ``loss``: the step's; ``grad_norm``: of its gradients, Δ's for low-rank layers, None if it was
    skipped because the loss was not finite; ``blocks``: how many blocks were walked, 1 for ordinary accumulation."""

    loss: float
    grad_norm: float | None
    blocks: int


@dataclass
class _Known:
    """What is kept of a model between steps."""

    loss: Any
    trial: Trial
    activations: Activations


_known: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()


def step(
    model: nn.Module,
    optimizer: LowRankOptimizer,
    micro_batches: Sequence[Any],
    *,
    loss: Loss,
    targets: Callable[[Any], int] | None = None,
    seed: int = 0,
    activations: str = "device",
    graphs_of_last: int = 0,
    turns: Turns | None = None,
) -> Taken:
    """One optimizer step over all ``micro_batches``, block by block, in the memory of one of them.

    ``loss(model, batch)`` is a scalar. With ``targets``, which counts what a batch's loss is a sum over, the step's
    loss is the sum of all losses divided by the sum of all targets; without, it is the mean of the losses.
    ``optimizer``: from :func:`qgalore.optimizer` with ``stepping="manual"``. ``seed``: of dropout. The blocks' inputs
    wait on the ``device`` or in ``host`` memory until the backward pass; the last ``graphs_of_last`` blocks keep their
    whole graphs instead, which saves running them again. ``turns``: a :class:`Stream`, if the blocks wait in host
    memory.

    In several processes (``team`` of the optimizer) each gives its share of the micro-batches, and all return the same.

    The first call tries whether the model can be walked, with the first micro-batch. If it cannot, its micro-batches
    are accumulated as usual, and a line says why. Raises :class:`ConfigError` for an optimizer of another kind, no
    micro-batches, or one that takes another way through the model than the first; and :class:`NumericalError` for a
    gradient that is not finite: weights of later blocks have moved then.
    """
    stepping = getattr(optimizer, "stepping", None)
    if stepping != "manual":
        raise ConfigError(
            f"qgalore.step was given an optimizer with stepping={stepping!r}, but it steps each tensor itself; build "
            "the optimizer with qgalore.optimizer(model, ..., stepping='manual')"
        )
    if not micro_batches:
        raise ConfigError("qgalore.step was given no micro-batches; a step needs at least one")
    with optimizer.team.together("the end of a step"):  # an error in one process is that of all
        mine = len(micro_batches) if targets is None else sum(map(targets, micro_batches))
        known = _look_at(model, micro_batches[0], loss, activations, graphs_of_last, optimizer.team)
        if turns is not None and (graphs_of_last or known.trial.layout is None):
            raise ConfigError(
                f"blocks are streamed only in a walk that keeps no graphs: graphs_of_last is {graphs_of_last}, and "
                f"{known.trial}"
            )
        total = optimizer.team.begin_total("the targets of a step", mine)
        runs = [partial(_share, model, loss, batch, total) for batch in micro_batches]
        try:
            value = _walk(model, optimizer, known, runs, seed, turns)
        except NotWalkableError as reason:
            raise ConfigError(
                f"a micro-batch of qgalore.step cannot be walked block by block as the first one was: {reason}. "
                "Nothing has moved; accumulate such micro-batches as usual, with an optimizer of stepping='deferred'"
            ) from reason
    blocks = 1 if known.trial.layout is None else len(known.trial.layout)
    if not math.isfinite(value):
        optimizer.skip()
        return Taken(value, None, blocks)
    optimizer.step()  # closes the step: all tensors have moved, and learning-rate schedulers wait for this call
    return Taken(value, optimizer.grad_norm, blocks)


def _walk(
    model: nn.Module, optimizer: LowRankOptimizer, known: _Known, runs: list[Run], seed: int, turns: Turns | None
) -> float:
    """Take the step, but for its close; its loss, of all processes. Nothing has moved if that is not finite."""
    team, layout, found = optimizer.team, known.trial.layout, []
    optimizer.accumulate_in_fp32(len(runs) * team.size > 1)

    def decide(total: Callable[[float], float], losses: Tensor) -> bool:
        found.append(total(float(losses.sum())))
        return math.isfinite(found[0])

    def reseed(number: int, part: int) -> None:
        walk.reseed(seed, optimizer.step_count, team.rank + number * team.size, part)

    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=devices):  # the caller's random numbers go on as they would
        if layout is None:
            alike = partial(decide, partial(team.total, "the loss of a step"))
            walk.accumulate(model, runs, reseed=reseed, decide=alike, step=partial(_step_tensors, optimizer))
            return found[0]
        turns = turns or (gathered(layout) if team.size > 1 else AlwaysThere())
        kept = known.activations
        with Steps(optimizer, layout, keep=False, at_once=not turns.stays) as steps:
            walk.walk(
                layout,
                runs,
                reseed=reseed,
                decide=partial(decide, steps.total),
                step=steps,
                activations=kept,
                turns=turns,
                attempt=steps.attempt,
                settle=steps.raise_failure,
            )
    return found[0]


def _share(model: nn.Module, loss: Loss, batch: Any, total: Callable[[], int]) -> Tensor:
    """A micro-batch's share of the step's loss."""
    return loss(model, batch) / max(total(), 1)


def _step_tensors(optimizer: LowRankOptimizer, _: str, parameters: list[nn.Parameter]) -> None:
    if optimizer.team.size > 1:  # the close of the step asks for all tensors, in one order everywhere
        return
    optimizer.step_tensors(optimizer.tensors_of(parameters))


def _as_written(loss: Loss) -> Any:
    """What a ``loss`` has in common with those that the same line of a program made in other steps."""
    plain = loss.func if isinstance(loss, partial) else loss
    return getattr(plain, "__code__", plain)


def _look_at(model: nn.Module, batch: Any, loss: Loss, where: str, graphs_of_last: int, team: Team) -> _Known:
    """What is known of ``model``, found out where it is not, or where the loss is another."""
    known, written = _known.get(model), _as_written(loss)
    if known is None or known.loss is not written:
        trial = try_walk(model, batch, loss)
        team.meet("the trial of a walk")
        if trial.layout is None:
            print(trial, flush=True)
        known = _known[model] = _Known(written, trial, Activations(where=where, graphs_of_last=graphs_of_last))
    if (known.activations.where, known.activations.graphs.last) != (where, graphs_of_last):
        known.activations = Activations(where=where, graphs_of_last=graphs_of_last)
    return known
