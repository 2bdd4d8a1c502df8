"""What blocks that live in host memory do not go with: a part of the table in ``incompatible``."""

from .sections import METHODS, Config


def problems(config: Config) -> list[str]:
    """What blocks that live in host memory do not go with."""
    stream, train = config.memory.stream, config.train
    if not config.memory.streams:
        return []
    wanted = (
        ("train.order", train.order, train.order != "batch_major", "layer_major"),
        (
            "method",
            config.method,
            METHODS[config.method][0] and config.method != "lora",
            "qgalore, galore or galore8bit",
        ),
        ("lowrank.rank", config.lowrank.rank, config.lowrank.rank != "auto", "a number, as records have a fixed size"),
        (
            "train.clip_grad_norm",
            f"{train.clip_grad_norm:g}",
            train.clip_grad_norm == 0 or config.lowrank.rule == "galore",
            f"train.clip_update_rms with rule {config.lowrank.rule}, whose whole gradients would have to wait",
        ),
        (
            "train.activation_checkpointing",
            str(train.activation_checkpointing).lower(),
            train.activation_checkpointing in ("auto", "offload") or train.activation_checkpointing is True,
            "true or offload, as a graph would hold on to the weights of its block",
        ),
        (
            "parallel",
            config.parallel,
            not config.parallel.splits or stream != "all",
            "memory.stream: weights, as each process keeps the state that it owns on its device, parallel: replicate",
        ),
        (
            "memory.slots",
            config.memory.slots,
            not config.parallel.splits or config.memory.slots == 2,
            f"2 with parallel: {config.parallel}, which gathers one block ahead",
        ),
    )
    return [
        f"{key}: {value} does not go with memory.stream: {stream}; use {remedy}, or memory.stream: none"
        for key, value, fine, remedy in wanted
        if not fine
    ]
