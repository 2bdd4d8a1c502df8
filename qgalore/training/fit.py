"""Whether a configuration fits: activation checkpointing is chosen for the memory there is, or the run refused."""

import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch

from ..config import Config
from ..config import bytes_of as budget_bytes
from ..config.incompatible import problems
from ..errors import ConfigError, DoesNotFitError
from ..memory import machine, plan
from ..memory.resident import make_states, resident
from ..memory.streamed import blocks_to_stream
from ..memory.streamed import on_paper as records_on_paper
from ..models.compiling import blocks_of
from ..models.loss import Loss, chunked_loss
from . import cluster, remarks
from .cluster import Machines
from .limits import Limit
from .model import Vocabulary, rule_of
from .paper import on_paper, plan_for, shares_of
from .proposals import CHECKPOINTING, PROPOSALS, STREAM, advice, candidates, changed, describe, host_candidates
from .say import say

# Chosen, not measured. Peaks are planned within 5 % where they were measured (small shapes, on a CPU). A GPU's
# allocator also loses what lies in gaps that it cannot use, and how much that is nobody has measured.
MARGIN = 1.2

Planned = tuple[Config, plan.Plan]


def decide(
    config: Config,
    vocabulary: Vocabulary,
    device: str,
    budget: int | None,
    loss: Loss | None = None,
    processes: int = 1,
) -> tuple[Config, plan.Plan]:
    """``config`` with activation checkpointing chosen, if it is left to us, and the plan of that.

    Fastest is to keep the graphs of all blocks from the forward pass, then those of as many blocks as the ``budget``
    has room for, with a margin. Where not even all blocks' inputs have room, they wait in host memory.
    """
    if config.memory.stream == "auto":
        return _least_streamed(config, vocabulary, device, budget, loss, processes)
    if config.train.activation_checkpointing != "auto":
        return config, plan_for(config, vocabulary, device, loss, processes)

    def planned(choice: bool | int | str) -> Planned:
        chosen = changed(config, {CHECKPOINTING: choice})
        return chosen, plan_for(chosen, vocabulary, device, loss, processes)

    if config.memory.streams:  # a graph would hold on to the weights of its block
        found = planned(True)
        over = budget is not None and found[1].total > budget
        can_offload = device == "cuda" and config.model.compile == "none"
        return planned("offload") if over and can_offload else found
    if budget is None:
        return planned(False)
    model, optimizer = on_paper(config, vocabulary, processes)
    # A model that fills most of the budget by itself need not be tried with all graphs first.
    full = sum(resident(model, optimizer.tensors).values()) > budget // 2
    whole = None if full else planned(False)
    if whole is not None and whole[1].total * MARGIN <= budget:
        return whole
    none = planned(True)
    if none[1].total > budget:
        # where weights are split, activations wait in host memory in a walk alone
        placed = none[1].walked or shares_of(config, processes) == 1
        can_offload = device == "cuda" and config.model.compile == "none" and placed
        return planned("offload") if can_offload else none
    if none[1].total * MARGIN > budget:
        return none
    blocks = len(blocks_of(model))
    most = blocks if whole is None else blocks - 1
    return _with_some_graphs(lambda n: planned(n if n < blocks else False), none, most, int(budget / MARGIN))


def _least_streamed(
    config: Config, vocabulary: Vocabulary, device: str, budget: int | None, loss: Loss | None, processes: int
) -> tuple[Config, plan.Plan]:
    """What ``memory.stream: auto`` comes to: nothing, the weights or all, whatever fits into ``budget`` first."""
    found = decide(changed(config, {STREAM: "none"}), vocabulary, device, budget, loss, processes)
    for choice in ("weights", "all"):
        if budget is None or found[1].total <= budget or _why_not_streamed(config, found[1], choice):
            break
        found = decide(changed(config, {STREAM: choice}), vocabulary, device, budget, loss, processes)
    return found


def _why_not_streamed(config: Config, found: plan.Plan, choice: str = "weights") -> str | None:
    """What keeps the blocks of a plan on the device, whatever its size; None if nothing does. ``choice``: how much of
    them is to leave it."""
    if broken := problems(changed(config, {STREAM: choice})):
        return broken[0]
    return None if found.walked else "blocks are streamed in layer-major steps, and this model is not walked"


def _with_some_graphs(planned: Callable[[int], Planned], none: Planned, most: int, room: int) -> Planned:
    """``planned(n)`` for the largest n that needs no more than ``room``, from 0, which ``none`` is, to ``most``.

    A peak is the largest of many moments, each of which grows by as much with every graph. So the peaks of all numbers
    lie on a convex line. Beyond two known points it rises no slower than between them, which limits how many may fit.
    Between the two it stays below their chord, which tells how many certainly do.
    """
    number, best, following = 0, none, 1
    while number < most:
        found = planned(following)
        rise = (found[1].total - best[1].total) / (following - number)
        if found[1].total > room:
            most = following - 1
            following = min(most, number + max(1, int((room - best[1].total) / rise)))
        else:
            number, best = following, found
            most = min(most, number + int((room - best[1].total) / rise)) if rise > 0 else most
            following = most
    return best


def proposals(
    changes: Iterable[dict[str, Any]],
    config: Config,
    vocabulary: Vocabulary,
    device: torch.device,
    limit: Limit,
    processes: int = 1,
) -> list[tuple[dict[str, Any], plan.Plan]]:
    """The first three of ``changes`` that make ``config`` fit, with the plans that they give. None of them holds
    another one, which is enough by itself."""
    found: list[tuple[dict[str, Any], plan.Plan]] = []
    for some in changes:
        wanted = changed(config, some)
        if problems(wanted) or any(less.items() <= some.items() for less, _ in found):
            continue
        planned = _tried(wanted, vocabulary, device, limit, processes)
        if planned is not None and limit.allows(planned, device):
            found.append((some, planned))
        if len(found) == PROPOSALS:
            break
    return found


def _tried(
    config: Config, vocabulary: Vocabulary, device: torch.device, limit: Limit, processes: int
) -> plan.Plan | None:
    """The plan of ``config``; None if it is known without a rehearsal that it does not fit, or cannot be streamed."""
    try:
        here, on_host = _least(config, vocabulary, device.type, processes)
        if (limit.budget is not None and here > limit.budget) or (limit.host is not None and on_host > limit.host):
            return None
        return decide(config, vocabulary, device.type, limit.budget, processes=processes)[1]
    except ConfigError:
        if config.memory.streams:
            return None
        raise


def _least(config: Config, vocabulary: Vocabulary, device: str, processes: int) -> tuple[int, int]:
    """Bytes that are on the device and on the host between two steps, or fewer where that depends on the budget."""
    if config.memory.stream == "auto":
        return 0, 0
    model, optimizer = on_paper(changed(config, {CHECKPOINTING: True}), vocabulary, processes)
    tensors = optimizer.tensors
    if not config.memory.streams:
        return sum(resident(model, tensors).values()), 0
    make_states(tensors)
    state, slots = config.memory.stream == "all", config.memory.slots
    streamed = records_on_paper(model, blocks_to_stream(model), tensors, slots, state, device=device)
    kept = resident(model, tensors, streamed.storages()) | streamed.on_device()
    return sum(kept.values()), streamed.host_bytes


def settle(
    config: Config, vocabulary: Vocabulary, device: torch.device, processes: int = 1, machines: Machines | None = None
) -> tuple[Config, plan.Plan]:
    """``config`` with activation checkpointing decided, and its plan for one of ``processes``, printed. With
    ``machines`` it is said too from how many tokens on the work of a step hides what they send. Raises
    :class:`DoesNotFitError`, with proposals."""
    whole = config.train.grad_accumulation
    config = changed(config, {"train.grad_accumulation": whole // processes})
    limit = Limit.of(config, device)
    if device.type == "cpu" and config.train.activation_checkpointing == "offload":
        say("note", "train.activation_checkpointing: offload has nowhere to go from a CPU; taken as true")
        config = changed(config, {CHECKPOINTING: True})
    chosen, found = decide(config, vocabulary, device.type, limit.budget, processes=processes)
    left = {CHECKPOINTING: config.train.activation_checkpointing, STREAM: config.memory.stream}
    now = {CHECKPOINTING: chosen.train.activation_checkpointing, STREAM: chosen.memory.stream}
    if made := {key: now[key] for key, asked in left.items() if asked == "auto"}:
        say("memory", f"auto → {describe(made)}")
    say("memory", f"planned peak {plan.human(found.total)} of {limit}")
    print(found, flush=True)
    elsewhere = device.type == "cuda" and not torch.cuda.is_available()
    room = None if elsewhere else limit.room_for_copy(found, device, built=False)
    copied = remarks.of_copy(found, processes // shares_of(chosen, processes), room)
    for line in filter(None, [*remarks.of_plan(chosen, found), copied]):
        say("memory", line)
    if STREAM in made and limit.over(found) and (why := _why_not_streamed(config, found)):
        say("memory", f"{STREAM}=auto cannot help: {why}")
    if rule_of(config) == "muon":
        say("muon", remarks.orthogonalisation(chosen, vocabulary))
    if processes > 1:
        cluster.print_job(chosen, vocabulary, processes, found, machines)
    _check(config, vocabulary, device, found, limit, processes)
    return changed(chosen, {"train.grad_accumulation": whole}), found


def _check(
    config: Config, vocabulary: Vocabulary, device: torch.device, found: plan.Plan, limit: Limit, processes: int
) -> None:
    """Raise :class:`DoesNotFitError`, with what would help, if ``found`` is beyond ``limit``."""
    short = limit.short_of_host(found, device)
    if limit.over(found):
        can_stream = device.type == "cuda" and _why_not_streamed(config, found) is None
        changes = candidates(config, device.type, can_stream)
        why, otherwise = (
            f"the plan needs {plan.human(found.total)}, and there are {limit}",
            "Take a smaller model or lowrank.rank",
        )
    elif short is not None:
        streams = found.streamed is not None
        changes, why = host_candidates(config, streams), short
        otherwise = (
            f"Lower lowrank.rank, take a smaller model, or set {STREAM}=none to keep the blocks on a larger device"
            if streams
            else f"Lower train.grad_accumulation, or set {CHECKPOINTING}=true to keep the blocks' inputs on the device"
        )
    else:
        return
    print("looking for what would fit …", file=sys.stderr, flush=True)
    options = proposals(changes, config, vocabulary, device, limit, processes)
    raise DoesNotFitError(f"{why}. {advice(options) if options else otherwise}")


def recheck(
    config: Config,
    vocabulary: Vocabulary,
    device: torch.device,
    loss: Loss,
    before: plan.Plan,
    processes: int = 1,
    again: bool = False,
) -> plan.Plan:
    """The plan again, for a model whose loss turned out to keep all logits, or where something else has changed."""
    whole_logits = loss is not chunked_loss and vocabulary.labels is None
    if not whole_logits and not again:
        return before
    config = changed(config, {"train.grad_accumulation": config.train.grad_accumulation // processes})
    found = plan_for(config, vocabulary, device.type, loss, processes)
    what = "whole logits included" if whole_logits else "for batch-major steps"
    say("memory", f"planned peak {plan.human(found.total)}, {what}")
    _check(config, vocabulary, device, found, replace(Limit.of(config, device), whose=what), processes)
    return found


def prepare_allocator(config: Config, device: torch.device, planned: plan.Plan) -> None:
    """Hold a GPU's allocator to ``memory.budget``, so that a run that would not fit the card it is meant for stops. On
    Linux keep the C allocator of a large CPU run from holding back what was freed between what was not."""
    if device.type == "cpu":
        if planned.tensors > machine.LARGE_RUN:
            machine.hold_back_nothing()
    elif config.memory.budget is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        share = (budget_bytes(config.memory.budget) - plan.CUDA_CONTEXT) / total
        if share <= 0:
            raise ConfigError(f"memory.budget is {config.memory.budget}, less than a CUDA context takes")
        torch.cuda.set_per_process_memory_fraction(min(share, 1.0), device)
