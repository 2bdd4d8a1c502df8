"""What would make a run fit that does not: changes of its configuration, the least harmful first."""

from collections.abc import Iterator, Sequence
from typing import Any

from ..config import METHODS, Config
from ..lowrank.subspace.ranks import STEP
from ..memory.plan import Plan, human

PROPOSALS = 3
CHECKPOINTING = "train.activation_checkpointing"
STREAM = "memory.stream"


def changed(config: Config, changes: dict[str, Any]) -> Config:
    for key, value in changes.items():
        section, name = key.split(".")
        part = getattr(config, section).model_copy(update={name: value})
        config = config.model_copy(update={section: part})
    return config


def candidates(config: Config, device: str, can_stream: bool = False) -> Iterator[dict[str, Any]]:
    """Changes that save memory of the device, the least harmful first; then several of them together. ``can_stream``:
    whether blocks can live in host memory, which changes no result."""
    train, low, data = config.train, config.lowrank, config.data
    free: dict[str, Any] = {}
    split = config.parallel.splits
    smallest = "offload" if device == "cuda" and config.model.compile == "none" and not split else True
    if train.activation_checkpointing not in (smallest, "offload", "auto"):
        free[CHECKPOINTING] = smallest
    singles = [free.copy()] if free else []
    singles += _streaming(config) if can_stream else []
    if METHODS[config.method][0] and low.embeddings == "full" and not split:
        singles.append({"lowrank.embeddings": "int8"})
    if train.micro_batch_size > 1:
        singles.append({"train.micro_batch_size": train.micro_batch_size // 2})
    if data.sequence_length > 1:
        singles.append({"data.sequence_length": data.sequence_length // 2})
    key, rank = _uniform_rank(config)
    if METHODS[config.method][0] and low.rank != "full":
        singles += _lower_ranks(config)
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


def _streaming(config: Config) -> list[dict[str, Any]]:
    """More of the blocks in host memory than there is now. A block's graph may not be kept then."""
    choices = {"none": ("weights", "all"), "weights": ("all",)}.get(config.memory.stream, ())
    asked = config.train.activation_checkpointing
    graphs = {} if asked in ("auto", "offload") or asked is True else {CHECKPOINTING: "auto"}
    return [{STREAM: choice, **graphs} for choice in choices]


def _lower_ranks(config: Config) -> list[dict[str, Any]]:
    key, rank = _uniform_rank(config)
    return [{key: rank // part} for part in (2, 4) if rank >= part * (1 if key == "lowrank.rank" else STEP)]


def host_candidates(config: Config, streams: bool) -> Iterator[dict[str, Any]]:
    """Changes that save memory of the host, the least harmful first. ``streams``: whether blocks live there."""
    if not streams:
        yield {CHECKPOINTING: True}
        return
    lower = _lower_ranks(config)
    weights = {STREAM: "weights"}
    if config.memory.stream != "weights":
        yield weights
    yield {STREAM: "none"}
    yield from lower
    yield from (weights | rank for rank in lower)


def _uniform_rank(config: Config) -> tuple[str, int]:
    """The key that decides what ranks cost, and its value; 0 for one that is not a number."""
    low = config.lowrank
    if low.rank == "auto":
        return "lowrank.mean_rank", low.mean_rank or low.max_rank or 0
    return "lowrank.rank", 0 if low.rank == "full" else low.rank


def advice(options: Sequence[tuple[dict[str, Any], Plan]]) -> str:
    """Lines of changes that would help, with what a run then takes. ``options`` is not empty."""
    lines = []
    for changes, found in options:
        of_host = f" and {human(found.host_total)} of host memory" if found.host_total >= 1 << 20 else ""
        lines.append(f"\n  {describe(changes)}  → {human(found.total)}{of_host}")
    return "These changes would make it fit:" + "".join(lines)


def describe(changes: dict[str, Any]) -> str:
    return " ".join(
        f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in changes.items()
    )
