"""The memory plan of a configuration, whether it fits, and what would make it fit."""

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..config import METHODS, Config
from ..config import bytes_of as budget_bytes
from ..errors import ConfigError, DoesNotFitError
from ..lowrank.factory import part_elements, trained_tensors
from ..lowrank.inner.checked import make_factory
from ..lowrank.layers.linear import LowRankLinear
from ..lowrank.rules import RuleOptions
from ..lowrank.subspace.policies import layers_at_once
from ..lowrank.subspace.ranks import STEP
from ..lowrank.subspace.refresh import RefreshOptions
from ..lowrank.tensors.base import TrainedTensor, attach
from ..lowrank.tensors.sharded import ShardedTensor, shareable
from ..memory import orthogonal_work, plan, traffic
from ..models import classify, loading
from ..models.compiling import blocks_of, blocks_to_compile
from ..models.loss import Loss, can_be_chunked, chunked_loss, summed_loss
from ..models.shapes import stored_config
from ..parallel import Team
from .model import (
    Vocabulary,
    adapt_as,
    architecture,
    checkpoint_as,
    convert_as,
    ordinary_leaf,
    rule_momentum,
    rule_of,
    rule_rank,
)
from .say import say

CHECKPOINTING = (False, True, "offload")  # from the fastest to the smallest
PROPOSALS = 3
LARGE_RUN = 2 << 30
M_MMAP_THRESHOLD, MAPPED_BYTES = -3, 2 << 20  # glibc's name for: give larger blocks pages of their own


def available(device: torch.device) -> int | None:
    """Bytes that this process may have in all on ``device``, what it holds already included; None if unknown. On a CPU
    the processes of a job share what is free."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024
    except (OSError, StopIteration, ValueError):
        return None
    limit, used = (_number(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None:
        free = min(free, limit - used)
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) + resident_set()


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def resident_set() -> int:
    """Bytes of physical memory that this process holds now; 0 where that is unknown."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGESIZE")


def _inner_factory(config: Config):
    """The inner optimizer to plan with: one that cannot step without values is planned as AdamW."""
    train = config.train
    if train.optimizer == "adamw8bit":
        return plan.Adam8bitShapes
    factory = make_factory(train.optimizer, train.lr, train.optimizer_options)
    leaf = torch.nn.Parameter(torch.zeros(16, 16, device="meta"))
    leaf.grad = torch.zeros_like(leaf)
    try:
        factory([leaf]).step()
    except Exception:  # whatever a foreign optimizer does with values that are not there
        return partial(torch.optim.AdamW, lr=train.lr)
    return factory


def has_weights(folder: Path) -> bool:
    """Whether a pretrained folder holds more than its description."""
    return any(folder.glob("*.safetensors"))


def _shape(config: Config, vocabulary: Vocabulary) -> torch.nn.Module:
    """The unconverted model. A pretrained folder that holds no weights yet is planned from its ``config.json``."""
    if config.model.path is not None and vocabulary.labels is None:
        folder = loading.local_folder(config.model.path)
        if not has_weights(folder):
            return loading.skeleton(stored_config(folder), dtype=getattr(torch, config.model.dtype))
    return architecture(config, vocabulary, lambda line: None)


def on_paper(config: Config, vocabulary: Vocabulary, shares: int = 1) -> tuple[torch.nn.Module, list[TrainedTensor]]:
    """The converted model of a resolved configuration and its trained tensors, all on the meta device; with more than
    one of ``shares``, those of layers in blocks are the ones of the first of so many processes."""
    model = _shape(config, vocabulary)
    if vocabulary.labels is None:
        loading.untie_padding(model)
    convert_as(config, model)
    if config.model.compile == "blocks":
        blocks_to_compile(model)
    adapt_as(config, model)
    checkpoint_as(config, model)
    low = config.lowrank
    lazy = {name: getattr(low, name) for name in ("cos_threshold", "gamma_proj", "queue_size", "max_gap")}
    how = {"rounding": low.weight_rounding, "scales": low.weight_scales}
    find = RefreshOptions(low.projector, low.policy, low.moments, **how)
    schedule = {"update_proj_gap": low.update_proj_gap, "stagger": low.stagger, "lazy": lazy, "find": find}
    of_rule = RuleOptions(rule_rank(config), low.update_proj_gap, **rule_momentum(config))
    tensors = trained_tensors(model, **schedule, rule=rule_of(config), of_rule=of_rule)
    if shares > 1:
        tensors = _shared(model, tensors, config.train.optimizer, shares)
    attach(tensors, _inner_factory(config), part_elements(config.train.optimizer))
    return model, tensors


def _shared(model: torch.nn.Module, tensors: list[TrainedTensor], inner: str, shares: int) -> list[TrainedTensor]:
    """The trained tensors, those of layers in ``model``'s blocks for one of the processes that split them. Raises
    :class:`ConfigError` where they cannot be split so."""
    inside = {module for block in blocks_of(model) for module in block.modules()}
    found = []
    for tensor in tensors:
        if tensor.module in inside:
            shareable(tensor.name, tensor.module, inner, shares, part_elements(inner))
            find = replace(tensor.options, team=Team(0, shares))
            tensor = ShardedTensor(tensor.name, tensor.index, tensor.module, tensor.schedule, find)
        found.append(tensor)
    return found


def gathered(model: torch.nn.Module) -> int:
    """Bytes of the stored weights of two of the largest block: as they come over the wire, and as the block uses
    them."""
    layers = ([m for m in block.modules() if isinstance(m, LowRankLinear)] for block in blocks_of(model))
    stored = ([t.nbytes for m in part for t in (m.weight, m.weight_scale) if t is not None] for part in layers)
    return 2 * max(map(sum, stored))


def plan_for(
    config: Config, vocabulary: Vocabulary, device: str, loss: Loss | None = None, shares: int = 1
) -> plan.Plan:
    """The plan of a resolved configuration for one process of ``shares`` that split the weights. ``loss``: the one it
    will use, where that is known already."""
    model, tensors = on_paper(config, vocabulary, shares)
    if vocabulary.labels is not None:
        loss = classify.rehearsal_loss(vocabulary.labels.outputs)
    elif loss is None:
        loss = chunked_loss if can_be_chunked(model) else summed_loss
    low = config.lowrank
    step = plan.Step(
        loss=loss,
        micro_batch_size=config.train.micro_batch_size,
        sequence_length=config.data.sequence_length,
        fused=config.train.stepping == "fused",
        masked=vocabulary.labels is not None or config.data.document_attention == "isolated",
        staggered=low.stagger,
        due_together=layers_at_once(
            config.lowrank.policy, sum(tensor.projected for tensor in tensors), config.lowrank.update_proj_gap
        ),
        micro_batches=config.train.grad_accumulation,
        device=device,
        layer_major=config.train.order != "batch_major",
        keeps={False: "graphs", "offload": "host"}.get(config.train.activation_checkpointing, "inputs"),
        clips=config.train.clip_grad_norm > 0,
    )
    outside = {"CUDA context (assumed)": plan.CUDA_CONTEXT}
    if device == "cpu":
        outside = {"this process so far": resident_set()}
    if shares > 1:
        outside["gathered blocks"] = gathered(model)
    if config.model.compile == "blocks":
        outside["gradients of a compiled block"] = compiled_gradients(model, ordinary_leaf(config))
    return plan.plan(model, tensors, step, outside)


def compiled_gradients(model: torch.nn.Module, leaf: str | None) -> int:
    """Bytes of all gradients of the largest block: a compiled one hands them out together."""
    sizes = [0]
    for block in blocks_of(model):
        leaves = [value for m in block.modules() if isinstance(m, LowRankLinear) for value in m.leaves().items()]
        other = {id(value) for name, value in leaves if name != leaf}
        wanted = [p for p in block.parameters() if p.is_floating_point() and id(p) not in other]
        sizes.append(sum(p.numel() * p.element_size() for p in wanted))
    return max(sizes)


def _changed(config: Config, changes: dict[str, Any]) -> Config:
    for key, value in changes.items():
        section, name = key.split(".")
        part = getattr(config, section).model_copy(update={name: value})
        config = config.model_copy(update={section: part})
    return config


def _candidates(config: Config, device: str) -> Iterator[dict[str, Any]]:
    """Changes that save memory, the least harmful first; then several of them together."""
    train, low, data = config.train, config.lowrank, config.data
    free: dict[str, Any] = {}
    split = config.parallel == "shard"
    smallest = "offload" if device == "cuda" and config.model.compile == "none" and not split else True
    if train.activation_checkpointing not in (smallest, "offload", "auto"):
        free["train.activation_checkpointing"] = smallest
    singles = [free.copy()] if free else []
    if METHODS[config.method][0] and low.embeddings == "full" and not split:
        singles.append({"lowrank.embeddings": "int8"})
    if train.micro_batch_size > 1:
        singles.append({"train.micro_batch_size": train.micro_batch_size // 2})
    if data.sequence_length > 1:
        singles.append({"data.sequence_length": data.sequence_length // 2})
    key, rank = _uniform_rank(config)
    if METHODS[config.method][0] and low.rank != "full":
        singles += [{key: rank // part} for part in (2, 4) if rank >= part * (1 if key == "lowrank.rank" else STEP)]
        singles += [{"lowrank.proj_type": "reverse_std"}] if low.proj_type == "std" else []
    yield from singles
    together: dict[str, Any] = {}
    for change in singles:
        together = together | change
        if len(together) > 1:
            yield together
    size, length, first = train.micro_batch_size, data.sequence_length, rank
    while size > 1 or length > 128 or rank > 64:
        size, length = max(1, size // 4), max(min(128, length), length // 4)
        rank = max(min(64, rank), rank // 4)
        smaller = {"train.micro_batch_size": size, "data.sequence_length": length, key: rank}
        now = {"train.micro_batch_size": train.micro_batch_size, "data.sequence_length": data.sequence_length}
        together = together | {k: v for k, v in smaller.items() if v != now.get(k, first)}
        yield together


def _uniform_rank(config: Config) -> tuple[str, int]:
    """The key that decides what ranks cost, and its value; 0 for one that is not a number."""
    low = config.lowrank
    if low.rank == "auto":
        return "lowrank.mean_rank", low.mean_rank or low.max_rank or 0
    return "lowrank.rank", 0 if low.rank == "full" else low.rank


def decide(
    config: Config, vocabulary: Vocabulary, device: str, budget: int | None, loss: Loss | None = None, shares: int = 1
) -> tuple[Config, plan.Plan]:
    """``config`` with activation checkpointing chosen, if it is left to us: the fastest whose plan is within
    ``budget``, else the smallest; and that plan."""
    if config.train.activation_checkpointing != "auto":
        return config, plan_for(config, vocabulary, device, loss, shares)
    can_offload = device == "cuda" and config.model.compile == "none" and shares == 1
    for choice in CHECKPOINTING if can_offload else CHECKPOINTING[:2]:
        chosen = _changed(config, {"train.activation_checkpointing": choice})
        found = plan_for(chosen, vocabulary, device, loss, shares)
        if budget is None or found.total <= budget:
            break
    return chosen, found


def proposals(
    config: Config, vocabulary: Vocabulary, device: str, budget: int, shares: int = 1
) -> list[tuple[dict[str, Any], int]]:
    """Up to three changes that make ``config`` fit into ``budget``, the least harmful first, with their totals."""
    found = []
    for changes in _candidates(config, device):
        quick = _changed(config, {**changes, "train.activation_checkpointing": True})
        if sum(plan.resident(*on_paper(quick, vocabulary, shares)).values()) > budget:
            continue  # without a rehearsal
        _, planned = decide(_changed(config, changes), vocabulary, device, budget, shares=shares)
        if planned.total <= budget:
            found.append((changes, planned.total))
        if len(found) == PROPOSALS:
            break
    return found


def describe(changes: dict[str, Any]) -> str:
    return " ".join(
        f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in changes.items()
    )


def settle(
    config: Config, vocabulary: Vocabulary, device: torch.device, processes: int = 1
) -> tuple[Config, plan.Plan]:
    """``config`` with activation checkpointing decided, and its plan for one of ``processes``, printed.

    Raises :class:`DoesNotFitError`, with proposals, if it is larger than the budget: ``memory.budget``, or what the
    device has.
    """
    asked, whole = config.memory.budget, config.train.grad_accumulation
    config = _changed(config, {"train.grad_accumulation": whole // processes})
    budget = budget_bytes(asked) if asked is not None else available(device)
    if device.type == "cpu" and config.train.activation_checkpointing == "offload":
        say("note", "train.activation_checkpointing: offload has nowhere to go from a CPU; taken as true")
        config = _changed(config, {"train.activation_checkpointing": True})
    shares = processes if config.parallel == "shard" else 1
    chosen, found = decide(config, vocabulary, device.type, budget, shares=shares)
    if chosen is not config:
        choice = {"train.activation_checkpointing": chosen.train.activation_checkpointing}
        say("memory", f"auto → {describe(choice)}")
    whose = "memory.budget" if asked is not None else f"free on {device.type}"
    say("memory", f"planned peak {plan.human(found.total)} of {plan.human(budget) if budget else '?'} ({whose})")
    print(found, flush=True)
    if rule_of(config) == "muon":
        say("muon", _orthogonalisation(chosen, vocabulary))
    if processes > 1:
        _, tensors = on_paper(config, vocabulary, shares)
        sizes = traffic.payload(tensors, config.lowrank.update_proj_gap, whole // processes)
        sent = {name: traffic.ring(size, processes, name) for name, size in sizes.items()}
        say("wire", f"{plan.human(round(sum(sent.values())))} sent by each of {processes} processes in a step")
        for name, size in sent.items():
            print(f"  {name:<40}{plan.human(round(size)):>10}", flush=True)
    if budget is not None and found.total > budget:
        raise DoesNotFitError(_refusal(config, vocabulary, device, found, budget, whose, shares))
    return _changed(chosen, {"train.grad_accumulation": whole}), found


def _orthogonalisation(config: Config, vocabulary: Vocabulary) -> str:
    """The share of a step's arithmetic in one process, whose ``train.grad_accumulation`` is given."""
    model, _ = on_paper(config, vocabulary)
    chosen = getattr(model.config.get_text_config(), "num_experts_per_tok", None)
    recomputed = config.train.activation_checkpointing is not False
    work = orthogonal_work.count(orthogonal_work.matrices(model, chosen), recomputed)
    tokens = config.train.micro_batch_size * config.data.sequence_length * config.train.grad_accumulation
    return orthogonal_work.line(work, tokens)


def _refusal(config, vocabulary, device: torch.device, found: plan.Plan, budget: int, whose: str, shares: int) -> str:
    print("looking for what would fit …", file=sys.stderr, flush=True)
    options = proposals(config, vocabulary, device.type, budget, shares)
    lines = [f"  {describe(changes)}  → {plan.human(total)}" for changes, total in options]
    advice = (
        "These changes would make it fit:\n" + "\n".join(lines) if lines else "Take a smaller model or lowrank.rank"
    )
    return f"the plan needs {plan.human(found.total)}, and there are {plan.human(budget)} ({whose}). {advice}"


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
    config = _changed(config, {"train.grad_accumulation": config.train.grad_accumulation // processes})
    shares = processes if config.parallel == "shard" else 1
    found = plan_for(config, vocabulary, device.type, loss, shares)
    budget = budget_bytes(config.memory.budget) if config.memory.budget is not None else available(device)
    what = "whole logits included" if whole_logits else "for batch-major steps"
    say("memory", f"planned peak {plan.human(found.total)}, {what}")
    if budget is not None and found.total > budget:
        raise DoesNotFitError(_refusal(config, vocabulary, device, found, budget, what, shares))
    return found


def prepare_allocator(config: Config, device: torch.device, planned: plan.Plan) -> None:
    """Hold a GPU's allocator to ``memory.budget``, so that a run that would not fit the card it is meant for stops. On
    Linux keep the C allocator of a large CPU run from holding back what was freed between what was not."""
    if device.type == "cpu":
        if planned.tensors > LARGE_RUN and sys.platform == "linux":
            with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
                ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)
    elif config.memory.budget is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        share = (budget_bytes(config.memory.budget) - plan.CUDA_CONTEXT) / total
        if share <= 0:
            raise ConfigError(f"memory.budget is {config.memory.budget}, less than a CUDA context takes")
        torch.cuda.set_per_process_memory_fraction(min(share, 1.0), device)
