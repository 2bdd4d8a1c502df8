"""What does not go together: one table of the rules between keys, each with its words for docs and its remedy."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .sections import ADAMS, METHODS, Config, DataSection, TrainSection


@dataclass(frozen=True)
class Conflict:
    """A rule between ``keys``. ``words`` state it in the reference; ``broken`` gives a message, with the values found
    and a remedy, for each way in which a configuration breaks it."""

    keys: tuple[str, ...]
    words: str
    broken: Callable[[Config], Iterable[str]]


def problems(config: Config) -> list[str]:
    """The messages of all rules that ``config`` breaks."""
    return [line for conflict in TABLE for line in conflict.broken(config)]


def _trains_converted(config: Config) -> bool:
    """Whether the method steps low-rank layers itself, as LoRA and the dense methods do not."""
    return METHODS[config.method][0] and config.method != "lora"


def _batch_major(config: Config) -> bool:
    """Whether the gradients of all blocks exist in one backward pass."""
    return config.train.order == "batch_major"


def _one_model(config: Config) -> Iterable[str]:
    if (config.model.config is None) == (config.model.path is None):
        yield "model: give exactly one of model.config (from scratch) and model.path (pretrained)"


def _shape_of_pretrained(config: Config) -> Iterable[str]:
    if config.model.path is not None and config.model.overrides:
        yield "model.overrides: changes the shape of a pretrained model; it goes with model.config only"


def _compiled_offload(config: Config) -> Iterable[str]:
    if config.model.compile == "blocks" and config.train.activation_checkpointing == "offload":
        yield "model.compile: blocks keep activations on the device; set train.activation_checkpointing: true"


def _compiled_ranks(config: Config) -> Iterable[str]:
    if config.model.compile == "blocks" and config.lowrank.rank == "auto" and METHODS[config.method][0]:
        yield "model.compile: blocks would make a graph for each rank; use a number for lowrank.rank"


def _fused_clipping(config: Config) -> Iterable[str]:
    if _batch_major(config) and config.train.stepping == "fused" and config.train.clip_grad_norm > 0:
        yield "train.stepping: fused cannot clip the global norm; use deferred, or clip_grad_norm: 0"


def _int8_export(config: Config) -> Iterable[str]:
    if "int8" in config.export.formats and (config.lowrank.weight_format or METHODS[config.method][1]) != "int8":
        yield f"export.formats: int8 needs int8 weights, which method {config.method} does not keep; use hf"


def _best_export(config: Config) -> Iterable[str]:
    if config.export.which == "best" and not config.train.keep_best:
        yield "export.which: best needs the best checkpoint kept; set train.keep_best: true"


def _decay(config: Config) -> Iterable[str]:
    train = config.train
    if train.lr * train.weight_decay >= 1:
        yield (
            f"train.weight_decay: {train.weight_decay:g} times train.lr, {train.lr:g}, is 1 or more, so a step would "
            "turn weights round instead of shrinking them; lower one of the two"
        )


def _gaps(config: Config) -> Iterable[str]:
    low = config.lowrank
    if low.max_gap is not None and low.max_gap < low.update_proj_gap:
        yield (
            f"lowrank.max_gap: {low.max_gap} is below lowrank.update_proj_gap, {low.update_proj_gap}, where gaps "
            "begin; raise it or lower that"
        )


def _adam_only(config: Config) -> Iterable[str]:
    train, fields = config.train, TrainSection.model_fields
    plain = train.betas == fields["betas"].default and train.eps == fields["eps"].default
    if train.optimizer not in (None, *ADAMS) and not plain:
        yield f"train.betas, train.eps: {train.optimizer} takes its options from train.optimizer_options"


def _sharded(config: Config) -> list[str]:
    """What weights split by rows do not go with."""
    if config.parallel != "shard":
        return []
    low, train, model = config.lowrank, config.train, config.model
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
        ("lowrank.rule", low.rule, low.rule == "galore", "galore"),
        ("lowrank.embeddings", low.embeddings, low.embeddings == "full", "full, which each process holds whole"),
        ("model.compile", model.compile, model.compile == "none", "none"),
        ("model.compute", model.compute, model.compute == "bf16", "bf16"),
        ("train.optimizer", train.optimizer, train.optimizer in (None, "adamw8bit", "adamw"), "adamw8bit or adamw"),
        ("train.stepping", train.stepping, train.stepping != "fused", "deferred"),
        (
            "train.activation_checkpointing",
            train.activation_checkpointing,
            train.activation_checkpointing != "offload",
            "true",
        ),
        ("data.task", config.data.task, config.data.task != "classify", "text or instruct"),
    )
    return [
        f"{key}: {value} does not go with parallel: shard; use {remedy}, or parallel: replicate"
        for key, value, fine, remedy in wanted
        if not fine
    ]


def _compute(config: Config) -> list[str]:
    low, (converted, weight_format, *_) = config.lowrank, METHODS[config.method]
    if config.model.compute == "bf16":
        return []
    if config.method == "lora" or not converted or (low.weight_format or weight_format) != "int8":
        return [f"model.compute: int8 is for trained int8 weights, which method {config.method} has not; use bf16"]
    if low.group_size != "row":
        return ["model.compute: int8 needs one scale for a row of weights; set lowrank.group_size: row"]
    return []


def _lora(config: Config) -> list[str]:
    found: list[str] = []
    if config.method != "lora":
        return found
    if config.lowrank.rank in ("full", "auto"):
        found.append("lowrank.rank: method lora needs the rank of its factors; give a number")
    if config.lowrank.embeddings == "int8":
        found.append("lowrank.embeddings: int8 ones are low-rank layers, which method lora freezes; use full")
    if other := [name for name in config.export.formats if name != "hf"]:
        found.append(f"export.formats: method lora's merged weights are not int8, as {other[0]} needs them; use hf")
    return found


def _automatic_rank(config: Config) -> list[str]:
    """Rules for ``lowrank.rank: auto``."""
    low, found = config.lowrank, []
    if low.rank != "auto" or not METHODS[config.method][0] or config.method == "lora":
        return found
    if low.rule != "galore":
        found.append(f"lowrank.rank: auto goes with rule: galore; rule {low.rule} needs a number")
    if low.proj_type == "full":
        found.append("lowrank.proj_type: full has two bases, and rank: auto goes by one spectrum; use another")
    if low.max_rank is not None and low.mean_rank is not None and low.mean_rank > low.max_rank:
        found.append(f"lowrank.mean_rank: {low.mean_rank} is above max_rank, {low.max_rank}; lower it or raise that")
    return found


def _whole_gradients(config: Config) -> list[str]:
    """What a rule that needs full gradients cannot work with."""
    train, rule = config.train, config.lowrank.rule
    if rule == "galore" or not _trains_converted(config):
        return []
    found = []
    if rule == "apollo" and config.lowrank.rank == "full":
        found.append("lowrank.rank: rule apollo needs the rank of its random projection; give a number")
    asked = {
        f"train.grad_accumulation: {train.grad_accumulation}": train.grad_accumulation > 1,
        f"train.clip_grad_norm: {train.clip_grad_norm:g}": train.clip_grad_norm > 0,
        "train.stepping: deferred": train.stepping == "deferred",
    }
    if _batch_major(config) and train.full_gradients == "free" and any(asked.values()):
        found.append(
            f"{' and '.join(key for key, given in asked.items() if given)}: rule {rule} needs full gradients, and "
            "would keep those of all layers at once until the step: 4 bytes (lowrank.grad_dtype: bfloat16: 2) for "
            "each of their weights, 24 GiB for a 7B model; accept that with train.full_gradients: keep, use "
            "grad_accumulation 1 without clipping, or use train.order: layer_major, which accumulates those of one "
            "block at a time"
        )
    return found


def _classifier(config: Config) -> list[str]:
    """Rules for ``data.task: classify``, and keys that mean nothing without it."""
    if config.data.task != "classify":
        own = {name: DataSection.model_fields[name].default for name in ("label_key", "label_type", "header", "metric")}
        given = sorted(name for name, default in own.items() if getattr(config.data, name) != default)
        return [f"data.{name}: goes with data.task: classify only" for name in given]
    found = []
    if config.data.valid is None:
        found.append("data.valid: data.task: classify needs held-out data")
    if config.model.path is None and config.data.tokenizer is None:
        found.append("data.tokenizer: data.task: classify needs one, or a model.path that has one")
    if set(config.export.formats) - {"hf"}:
        found.append("export.formats: a classifier is exported as hf only")
    suits = {"pearson", "spearman"} if config.data.label_type == "number" else {"accuracy", "f1", "matthews"}
    if wrong := sorted(set(config.data.metric) - suits):
        found.append(
            f"data.metric: {wrong[0]} does not suit data.label_type: {config.data.label_type}; "
            f"use {', '.join(sorted(suits))}"
        )
    return found


TABLE = (
    Conflict(("model.config", "model.path"), "give exactly one of `model.config` and `model.path`", _one_model),
    Conflict(
        ("model.overrides", "model.path"), "`model.overrides` goes with `model.config` only", _shape_of_pretrained
    ),
    Conflict(
        ("model.compile", "train.activation_checkpointing"),
        "compiled blocks do not go with `train.activation_checkpointing: offload`",
        _compiled_offload,
    ),
    Conflict(
        ("parallel",),
        "`shard` needs method qgalore, galore or galore8bit, rule galore with a right basis and a number as rank, full "
        "embeddings, deferred stepping, 8-bit or fp32 Adam, and a task other than classify",
        _sharded,
    ),
    Conflict(("train.stepping", "train.clip_grad_norm"), "fused stepping cannot clip the global norm", _fused_clipping),
    Conflict(("model.compile", "lowrank.rank"), "compiled blocks do not go with `lowrank.rank: auto`", _compiled_ranks),
    Conflict(
        ("model.compute", "lowrank.group_size"),
        "`model.compute: int8` needs trained int8 weights and `lowrank.group_size: row`",
        _compute,
    ),
    Conflict(
        ("train.full_gradients", "train.grad_accumulation", "train.clip_grad_norm", "lowrank.rule"),
        "in batch-major steps a rule other than galore needs `train.full_gradients: keep` for accumulation, clipping "
        "or deferred stepping; "
        "rule apollo needs a number as rank",
        _whole_gradients,
    ),
    Conflict(
        ("method", "lowrank.rank", "lowrank.embeddings", "export.formats"),
        "method lora needs a number as rank, full embeddings and `hf` exports",
        _lora,
    ),
    Conflict(
        ("lowrank.rank", "lowrank.max_rank", "lowrank.mean_rank", "lowrank.proj_type"),
        "`rank: auto` goes with rule galore, one-sided projection, and a `mean_rank` of at most `max_rank`",
        _automatic_rank,
    ),
    Conflict(("export.formats",), "`int8` needs int8 weights", _int8_export),
    Conflict(
        ("data.label_key", "data.label_type", "data.header", "data.metric", "data.valid", "data.tokenizer"),
        "labels go with `data.task: classify` only, which needs `data.valid`, a tokenizer, metrics that suit the "
        "labels, and `hf` exports",
        _classifier,
    ),
    Conflict(("export.which", "train.keep_best"), "`best` needs `train.keep_best: true`", _best_export),
    Conflict(("train.weight_decay", "train.lr"), "their product must be below 1", _decay),
    Conflict(("lowrank.max_gap", "lowrank.update_proj_gap"), "gaps begin at `update_proj_gap`", _gaps),
    Conflict(
        ("train.betas", "train.eps"),
        "an optimizer given by its dotted path takes `train.optimizer_options` instead",
        _adam_only,
    ),
)
