"""What does not go together: one table of the rules between keys, each with its words for docs and its remedy."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .. import combinations
from . import duration, sharded, sources, streamed
from .sections import ADAMS, METHODS, Config
from .train_section import TrainSection

# The keys behind the arguments of convert() and optimizer() for which conflicts are stated in ``combinations``.
KEYS = combinations.Door(
    {
        "compute": "model.compute",
        **{name: f"train.{name}" for name in ("stepping", "full_gradients", "order", "clip_update_rms")},
        **{
            name: f"lowrank.{name}"
            for name in (
                "rank", "max_rank", "mean_rank", "proj_type", "weight_format", "group_size", "rule", "max_gap",
                "update_proj_gap",
            )
        },
    }
)  # fmt: skip


def _lines(*messages: str | None) -> list[str]:
    return [one for one in messages if one is not None]


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


def _grown_from_scratch(config: Config) -> Iterable[str]:
    if config.model.grow_vocabulary and config.model.path is None:
        yield (
            "model.grow_vocabulary: is for a pretrained model; one from model.config has the rows that its tokenizer "
            "needs, or model.overrides.vocab_size"
        )


def _compiled_offload(config: Config) -> Iterable[str]:
    if config.model.compile == "blocks" and config.train.activation_checkpointing == "offload":
        yield "model.compile: blocks keep activations on the device; set train.activation_checkpointing: true"


def _compiled_ranks(config: Config) -> Iterable[str]:
    if config.model.compile == "blocks" and config.lowrank.rank == "auto" and METHODS[config.method][0]:
        yield "model.compile: blocks would make a graph for each rank; use a number for lowrank.rank"


def _flex(config: Config) -> Iterable[str]:
    if config.model.attention == "flex" and config.data.task == "classify":
        yield "model.attention: flex is for documents packed into rows, and data.task: classify has none; use auto"
    if config.model.compile == "blocks" and config.model.attention == "flex":
        yield "model.attention: flex would have compiled blocks compiled anew for every row; use sdpa, or compile: none"


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


def _gaps(config: Config) -> list[str]:
    return _lines(combinations.gaps(KEYS, config.lowrank.max_gap, config.lowrank.update_proj_gap))


def _adam_only(config: Config) -> Iterable[str]:
    train, fields = config.train, TrainSection.model_fields
    plain = train.betas == fields["betas"].default and train.eps == fields["eps"].default
    if train.optimizer not in (None, *ADAMS) and not plain:
        yield f"train.betas, train.eps: {train.optimizer} takes its options from train.optimizer_options"


def _compute(config: Config) -> list[str]:
    low = config.lowrank
    trained = _trains_converted(config)
    kept = (low.weight_format or METHODS[config.method][1]) if trained else "none"
    whose = "these" if trained else f"those of method {config.method}"
    return _lines(combinations.integer_products(KEYS, config.model.compute, kept, low.group_size, whose))


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
    low = config.lowrank
    if not _trains_converted(config):
        return []
    return _lines(
        combinations.automatic_rule(KEYS, low.rank == "auto", low.rule),
        combinations.automatic_side(KEYS, low.rank, low.proj_type),
        combinations.ordered_ranks(KEYS, low.rank, low.mean_rank, low.max_rank),
    )


def _whole_gradients(config: Config) -> list[str]:
    """What a rule that needs full gradients cannot work with."""
    train, low = config.train, config.lowrank
    if not _trains_converted(config):
        return []
    walks, clips = not _batch_major(config), train.clip_grad_norm > 0
    waiting = {
        f"train.grad_accumulation: {train.grad_accumulation}": train.grad_accumulation > 1 and not walks,
        f"train.clip_grad_norm: {train.clip_grad_norm:g}": clips,
        "train.stepping: deferred": train.stepping == "deferred" and not walks,
    }
    asked = [key for key, given in waiting.items() if given]
    return _lines(
        combinations.projection_rank(KEYS, low.rule, low.rank),
        combinations.whole_gradients(KEYS, low.rule, train.full_gradients, asked, clips=clips, walks=walks),
    )


def _limited_updates(config: Config) -> list[str]:
    rule = config.lowrank.rule if _trains_converted(config) else None
    return _lines(combinations.limited_updates(KEYS, rule, config.train.clip_update_rms))


TABLE = (
    Conflict(("model.config", "model.path"), "Give exactly one of `model.config` and `model.path`.", _one_model),
    Conflict(
        ("model.grow_vocabulary", "model.config"),
        "`model.grow_vocabulary` goes with `model.path` only.",
        _grown_from_scratch,
    ),
    Conflict(
        ("train.max_steps", "train.epochs"),
        "Give exactly one of `train.max_steps` and `train.epochs`.",
        duration.one_length,
    ),
    Conflict(
        ("train.warmup_steps", "train.warmup_ratio"),
        "Give at most one of `train.warmup_steps` and `train.warmup_ratio`.",
        duration.one_warmup,
    ),
    Conflict(
        ("model.compile", "train.activation_checkpointing"),
        "Compiled blocks do not go with `train.activation_checkpointing: offload`.",
        _compiled_offload,
    ),
    Conflict(
        ("parallel",),
        "`shard` needs method `qgalore`, `galore` or `galore8bit`, and layer-major steps.",
        sharded.problems,
    ),
    Conflict(
        ("memory.stream",),
        "Streamed blocks need layer-major steps, method `qgalore`, `galore` or `galore8bit`, and a number as rank. "
        "They do not go with graphs kept from the forward pass or, for a rule other than `galore`, with "
        "`train.clip_grad_norm`. With `parallel: shard` there are `weights` and two `memory.slots` alone.",
        streamed.problems,
    ),
    Conflict(
        ("train.stepping", "train.clip_grad_norm"), "Fused stepping cannot clip the global norm.", _fused_clipping
    ),
    Conflict(
        ("model.compile", "lowrank.rank"), "Compiled blocks do not go with `lowrank.rank: auto`.", _compiled_ranks
    ),
    Conflict(
        ("model.attention", "model.compile", "data.task"),
        "Neither compiled blocks nor `data.task: classify` go with `model.attention: flex`.",
        _flex,
    ),
    Conflict(
        ("model.compute", "lowrank.group_size"),
        "`model.compute: int8` needs trained int8 weights and `lowrank.group_size: row`.",
        _compute,
    ),
    Conflict(
        ("train.full_gradients", "train.grad_accumulation", "train.clip_grad_norm", "lowrank.rule"),
        "A rule other than `galore` needs `train.full_gradients: keep` for a clipped global norm. In batch-major steps "
        "it also does for accumulation and deferred stepping. Rule `apollo` needs a number as rank.",
        _whole_gradients,
    ),
    Conflict(
        ("train.clip_update_rms", "lowrank.rule"),
        "`train.clip_update_rms` goes with a rule other than `galore`.",
        _limited_updates,
    ),
    Conflict(
        ("method", "lowrank.rank", "lowrank.embeddings", "export.formats"),
        "Method `lora` needs a number as rank, full embeddings and `hf` exports.",
        _lora,
    ),
    Conflict(
        ("lowrank.rank", "lowrank.max_rank", "lowrank.mean_rank", "lowrank.proj_type"),
        "`rank: auto` goes with rule `galore`, one-sided projection, and a `mean_rank` of at most `max_rank`.",
        _automatic_rank,
    ),
    Conflict(("export.formats",), "`int8` needs int8 weights.", _int8_export),
    Conflict(
        ("data.label_key", "data.label_type", "data.header", "data.metric", "data.valid", "data.tokenizer"),
        "Labels go with `data.task: classify` only. This task needs `data.valid`, a tokenizer, metrics that suit the "
        "labels, and `hf` exports.",
        sources.classified,
    ),
    Conflict(
        ("data.train", "data.task"),
        "A list of sources does not go with `data.task: classify`. A source with `task: instruct` needs it as "
        "`data.task` too.",
        sources.mixed,
    ),
    Conflict(("export.which", "train.keep_best"), "`best` needs `train.keep_best: true`.", _best_export),
    Conflict(
        ("train.weight_decay", "train.lr"),
        "The product of `train.lr` and `train.weight_decay` must be below 1.",
        _decay,
    ),
    Conflict(
        ("lowrank.max_gap", "lowrank.update_proj_gap"),
        "`max_gap` must be at least `update_proj_gap`.",
        _gaps,
    ),
    Conflict(
        ("train.betas", "train.eps"),
        "An optimizer given by its dotted path takes `train.optimizer_options` instead.",
        _adam_only,
    ),
)
