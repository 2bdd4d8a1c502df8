"""Whether a configuration fits: activation checkpointing is chosen for the memory there is, or the run refused."""

import sys
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..config import Config
from ..config import bytes_of as budget_bytes
from ..config.incompatible import problems
from ..errors import ConfigError, DoesNotFitError
from ..memory import machine, plan
from ..memory.resident import resident
from ..models.compiling import blocks_of
from ..models.loss import Loss, chunked_loss
from . import remarks
from .model import Vocabulary, rule_of
from .paper import on_paper, plan_for, shares_of
from .proposals import PROPOSALS, STREAM, candidates, changed, describe
from .say import say

# Chosen, not measured. Peaks are planned within 5 % where they were measured (small shapes, on a CPU). A GPU's
# allocator also loses what lies in gaps that it cannot use, and how much that is nobody has measured.
MARGIN = 1.2
CHECKPOINTING = "train.activation_checkpointing"


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

    def planned(choice: bool | int | str) -> tuple[Config, plan.Plan]:
        chosen = changed(config, {CHECKPOINTING: choice})
        return chosen, plan_for(chosen, vocabulary, device, loss, processes)

    if config.memory.streams:  # a graph would hold on to the weights of its block
        found = planned(True)
        over = budget is not None and found[1].total > budget
        return planned("offload") if over and device == "cuda" else found
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
    whole = whole or planned(False)
    return _with_some_graphs(planned, none, whole[1].total, len(blocks_of(model)), int(budget / MARGIN))


def _least_streamed(
    config: Config, vocabulary: Vocabulary, device: str, budget: int | None, loss: Loss | None, processes: int
) -> tuple[Config, plan.Plan]:
    """What ``memory.stream: auto`` comes to: nothing, the weights or all, whatever fits into ``budget`` first."""
    found = decide(changed(config, {STREAM: "none"}), vocabulary, device, budget, loss, processes)
    for choice in ("weights", "all"):
        if budget is None or found[1].total <= budget or _why_not_streamed(config, found[1], processes):
            break
        found = decide(changed(config, {STREAM: choice}), vocabulary, device, budget, loss, processes)
    return found


def _why_not_streamed(config: Config, found: plan.Plan, processes: int) -> str | None:
    """What keeps the blocks of a plan on the device, whatever its size; None if nothing does."""
    if processes > 1:
        return f"blocks are streamed in one process, and there are {processes}"
    if broken := problems(changed(config, {STREAM: "weights"})):
        return broken[0]
    return None if found.walked else "blocks are streamed in layer-major steps, and this model is not walked"


def _with_some_graphs(planned, none: tuple[Config, plan.Plan], whole: int, blocks: int, room: int):
    """The most of ``blocks`` that may keep their graphs in ``room``: between those of ``none`` and the ``whole``.

    A peak is the largest of many moments, each of which grows by as much with every graph. So the peaks of all numbers
    lie on a convex line, below any chord. Where a chord meets the room, there is a number that fits, and the next one
    may fit too.
    """
    number, best = 0, none
    while number < blocks - 1 and best[1].total < room < whole:
        slope = (whole - best[1].total) / (blocks - number)
        further = min(blocks - 1, number + max(1, int((room - best[1].total) / slope)))
        found = planned(further)
        if found[1].total > room:
            break
        number, best = further, found
    return best


def proposals(
    config: Config, vocabulary: Vocabulary, device: str, limit: "Limit", processes: int = 1
) -> list[tuple[dict[str, Any], int]]:
    """Up to three changes that make ``config`` fit into ``limit``, the least harmful first, with their totals."""
    found, budget = [], limit.budget
    assert budget is not None, "nothing is refused without a budget"
    for changes in candidates(config, device, processes):
        quick = changed(config, {**changes, "train.activation_checkpointing": True})
        model, optimizer = on_paper(quick, vocabulary, processes)
        if quick.memory.stream == "none" and sum(resident(model, optimizer.tensors).values()) > budget:
            continue  # without a rehearsal
        chosen, planned = decide(changed(config, changes), vocabulary, device, budget, processes=processes)
        if STREAM in changes and not chosen.memory.streams:
            changes = {key: value for key, value in changes.items() if key != STREAM}  # it does nothing here
        if planned.total <= budget and (limit.host is None or planned.host_total <= limit.host):
            found.append((changes, planned.total))
        if len(found) == PROPOSALS:
            break
    return found


def settle(
    config: Config, vocabulary: Vocabulary, device: torch.device, processes: int = 1
) -> tuple[Config, plan.Plan]:
    """``config`` with activation checkpointing decided, and its plan for one of ``processes``, printed.

    Raises :class:`DoesNotFitError`, with proposals, if it is larger than the budget: ``memory.budget``, or what the
    device has; and if it needs more of the host than ``memory.host_budget``.
    """
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
    for line in remarks.of_plan(chosen, found):
        say("memory", line)
    over = limit.budget is not None and found.total > limit.budget
    if STREAM in made and over and (why := _why_not_streamed(config, found, processes)):
        say("memory", f"{STREAM}=auto cannot help: {why}")
    if rule_of(config) == "muon":
        say("muon", remarks.orthogonalisation(chosen, vocabulary))
    if processes > 1:
        remarks.print_traffic(config, vocabulary, processes, 1 if found.walked else whole // processes)
    _check(config, vocabulary, device, found, limit, processes)
    return changed(chosen, {"train.grad_accumulation": whole}), found


@dataclass(frozen=True)
class Limit:
    """What a run may use of the device, in bytes or None if unknown, and who says so; and of the host, if that is
    limited."""

    budget: int | None
    whose: str
    host: int | None = None

    @classmethod
    def of(cls, config: Config, device: torch.device) -> "Limit":
        """The limits that ``config`` sets, or what ``device`` has."""
        asked, host = config.memory.budget, config.memory.host_budget
        of_host = None if host is None else budget_bytes(host)
        if asked is not None:
            return cls(budget_bytes(asked), "memory.budget", of_host)
        return cls(machine.available(device), f"free on {device.type}", of_host)

    def __str__(self) -> str:
        return f"{'?' if self.budget is None else plan.human(self.budget)} ({self.whose})"


def _check(
    config: Config, vocabulary: Vocabulary, device: torch.device, found: plan.Plan, limit: Limit, processes: int
) -> None:
    """Raise :class:`DoesNotFitError` if ``found`` is beyond ``limit``."""
    if limit.budget is not None and found.total > limit.budget:
        raise DoesNotFitError(_refusal(config, vocabulary, device, found, limit, processes))
    if limit.host is not None and found.host_total > limit.host:
        remedy = (
            f"lower lowrank.rank, or set {STREAM}=none to keep the blocks on the device"
            if found.streamed is not None
            else f"lower train.grad_accumulation, or set {CHECKPOINTING}=true to keep the blocks' inputs on the device"
        )
        raise DoesNotFitError(
            f"the plan needs {plan.human(found.host_total)} of host memory, and there are {plan.human(limit.host)} "
            f"(memory.host_budget). Raise memory.host_budget, {remedy}"
        )
    if found.streamed is None or (device.type == "cuda" and not torch.cuda.is_available()):
        return
    here = machine.available(torch.device("cpu"))
    needed = found.host_total + (found.total if device.type == "cpu" else machine.resident_set())
    if here is not None and needed > here:
        raise DoesNotFitError(
            f"the plan needs {plan.human(needed)} of this machine's memory for streamed blocks"
            f"{' and the device they are streamed to' if device.type == 'cpu' else ''}, and {plan.human(here)} are "
            f"free. Lower lowrank.rank, take a smaller model, or set {STREAM}=none"
        )


def _refusal(
    config: Config, vocabulary: Vocabulary, device: torch.device, found: plan.Plan, limit: Limit, processes: int
) -> str:
    print("looking for what would fit …", file=sys.stderr, flush=True)
    options = proposals(config, vocabulary, device.type, limit, processes)
    lines = [f"  {describe(changes)}  → {plan.human(total)}" for changes, total in options]
    advice = (
        "These changes would make it fit:\n" + "\n".join(lines) if lines else "Take a smaller model or lowrank.rank"
    )
    return f"the plan needs {plan.human(found.total)}, and there are {limit}. {advice}"


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
