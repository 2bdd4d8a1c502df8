"""What does not go together with ``parallel: shard``."""

from .sections import METHODS, Config


def problems(config: Config) -> list[str]:
    """What weights split by rows do not go with."""
    if not config.parallel.splits:
        return []
    low, train, model = config.lowrank, config.train, config.model
    walks = train.order != "batch_major"
    right = low.proj_type == "right" or low.rank == "full"
    wanted = (
        (
            "method",
            config.method,
            METHODS[config.method][0] and config.method != "lora",
            "qgalore, galore or galore8bit",
        ),
        ("lowrank.proj_type", low.proj_type, right, "right: a left basis moves every row by the whole of Δ"),
        ("lowrank.rank", low.rank, low.rank != "auto", "a number"),
        ("lowrank.rule", low.rule, low.rule == "galore", "galore: another rule's update hangs on the whole matrix"),
        ("lowrank.embeddings", low.embeddings, low.embeddings == "full", "full, which each process holds whole"),
        ("model.compile", model.compile, model.compile == "none", "none"),
        ("model.compute", model.compute, model.compute == "bf16", "bf16"),
        ("train.optimizer", train.optimizer, train.optimizer in (None, "adamw8bit", "adamw"), "adamw8bit or adamw"),
        ("train.stepping", train.stepping, train.stepping != "fused" or walks, "deferred"),
        (
            "train.activation_checkpointing",
            train.activation_checkpointing,
            train.activation_checkpointing != "offload" or walks,
            "true or train.order: layer_major",
        ),
        ("data.task", config.data.task, config.data.task != "classify", "text or instruct"),
    )
    return [
        f"{key}: {value} does not go with parallel: {config.parallel}; use {remedy}, or parallel: replicate"
        for key, value, fine, remedy in wanted
        if not fine
    ]
