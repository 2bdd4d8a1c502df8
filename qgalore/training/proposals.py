"""What would make a run fit that does not: changes of its configuration, the least harmful first."""

from collections.abc import Iterator
from typing import Any

from ..config import METHODS, Config
from ..config.incompatible import problems
from ..lowrank.subspace.ranks import STEP

PROPOSALS = 3
STREAM = "memory.stream"


def changed(config: Config, changes: dict[str, Any]) -> Config:
    for key, value in changes.items():
        section, name = key.split(".")
        part = getattr(config, section).model_copy(update={name: value})
        config = config.model_copy(update={section: part})
    return config


def candidates(config: Config, device: str, processes: int = 1) -> Iterator[dict[str, Any]]:
    """Changes that save memory, the least harmful first; then several of them together."""
    train, low, data = config.train, config.lowrank, config.data
    free: dict[str, Any] = {}
    split = config.parallel == "shard"
    smallest = "offload" if device == "cuda" and config.model.compile == "none" and not split else True
    if train.activation_checkpointing not in (smallest, "offload", "auto"):
        free["train.activation_checkpointing"] = smallest
    singles = [free.copy()] if free else []
    if device == "cuda" and processes == 1 and _can_be_streamed(changed(config, free)):
        singles.append(free | {STREAM: "auto"})  # the same bits, from the host's memory
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


def _can_be_streamed(config: Config) -> bool:
    """Whether nothing but the model may forbid blocks in host memory, which the configuration does not ask for."""
    return config.memory.stream == "none" and not problems(changed(config, {STREAM: "weights"}))


def _uniform_rank(config: Config) -> tuple[str, int]:
    """The key that decides what ranks cost, and its value; 0 for one that is not a number."""
    low = config.lowrank
    if low.rank == "auto":
        return "lowrank.mean_rank", low.mean_rank or low.max_rank or 0
    return "lowrank.rank", 0 if low.rank == "full" else low.rank


def describe(changes: dict[str, Any]) -> str:
    return " ".join(
        f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in changes.items()
    )
