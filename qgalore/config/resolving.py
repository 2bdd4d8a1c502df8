"""What the method and the device decide, what a configuration says in vain, and what a resumed run may change."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from pydantic import ValidationError

from ..combinations import RULES
from ..errors import ConfigError
from ..schedule_defaults import THRESHOLDS, longest_gap
from .data_section import DataSection
from .duration import asked
from .incompatible import problems
from .sections import METHODS, Config


def _micro_batches(config: Config, processes: int) -> int:
    """Micro-batches of a step in each of ``processes``: ``train.grad_accumulation`` counts those of all together."""
    train = config.train
    if train.grad_accumulation % processes:
        raise ConfigError(
            f"train.grad_accumulation is {train.grad_accumulation}, the micro-batches of a step, which {processes} "
            f"processes cannot share equally; set a multiple of {processes} (and train.micro_batch_size accordingly)"
        )
    mine = train.grad_accumulation // processes
    if train.order == "batch_major" and train.stepping == "fused" and mine > 1:
        raise ConfigError(
            "train.stepping: fused takes one backward pass a step in each process; use deferred with "
            f"grad_accumulation {train.grad_accumulation} in {processes}"
        )
    return mine


def batch_major(config: Config, why: str, processes: int = 1) -> Config:
    """``config`` with batch-major steps, because of ``why``. Raises :class:`ConfigError` if it asks for something that
    only layer-major steps can do."""
    config = config.model_copy(update={"train": config.train.model_copy(update={"order": "batch_major"})})
    if found := problems(config):
        raise ConfigError(f"the steps are batch-major, because {why}\n" + "\n".join(f"  {line}" for line in found))
    _micro_batches(config, processes)
    return config


def resolve(config: Config, device: str, bf16: bool, processes: int = 1) -> Config:
    """Fill in what ``method``, ``device`` ("cuda" or "cpu"; ``bf16``: the device computes in it) and the number of
    processes decide. Raises :class:`ConfigError` for a number that does not go with the mesh or the micro-batches."""
    if config.model.attention == "flex" and device == "cpu":
        raise ConfigError(
            "model.attention is flex, which has no backward pass on a CPU; set model.attention=auto, or train on a GPU"
        )
    _, weight_format, basis_format, optimizer = METHODS[config.method]
    dtype = config.model.dtype if config.model.dtype != "auto" else ("bfloat16" if bf16 else "float32")
    train, lowrank = config.train, config.lowrank
    threshold = THRESHOLDS.get(lowrank.policy) if lowrank.cos_threshold is None else lowrank.cos_threshold
    mesh = config.parallel.over(processes)
    stepping, mine = train.stepping, _micro_batches(config, processes)
    if stepping == "auto":
        kept = mine > 1 or train.clip_grad_norm > 0 or mesh.splits
        stepping = "deferred" if kept else "fused"
    return config.model_copy(
        update={
            "device": device,
            "model": config.model.model_copy(update={"dtype": dtype}),
            "train": train.model_copy(update={"stepping": stepping, "optimizer": train.optimizer or optimizer}),
            "lowrank": lowrank.model_copy(
                update={
                    "cos_threshold": threshold,
                    "scale": lowrank.scale or RULES[lowrank.rule].scale,
                    "weight_format": lowrank.weight_format or weight_format,
                    "basis_format": lowrank.basis_format or basis_format or ("bf16" if dtype == "bfloat16" else "fp32"),
                    "max_gap": lowrank.max_gap or longest_gap(lowrank.update_proj_gap),
                    # a product of bf16 matrices arrives rounded to bf16; only a sum of several deserves fp32
                    "grad_dtype": lowrank.grad_dtype
                    or ("bfloat16" if dtype == "bfloat16" and train.grad_accumulation == 1 else "float32"),
                }
            ),
        }
    )


# Keys that only stored bases give a meaning.
_OF_BASES = (
    "rank", "proj_type", "update_proj_gap", "cos_threshold", "gamma_proj", "queue_size", "max_gap", "stagger",
    "projector", "policy", "moments", "basis_format", "energy", "max_rank", "mean_rank",
)  # fmt: skip


# What a refresh policy does not read.
_UNREAD = {
    "energy": ("cos_threshold", "gamma_proj", "queue_size"),
    "fixed": ("cos_threshold", "gamma_proj", "queue_size", "max_gap"),
}


def _idle_keys(config: Config) -> str:
    """The given low-rank keys that the rule does not read."""
    rule = RULES[config.lowrank.rule]
    with_bases, read = rule.uses_basis, rule.reads
    if config.method == "lora":
        with_bases, read = False, ("rank",)
    idle = set() if with_bases else set(_OF_BASES) - set(read)
    return ", ".join(f"lowrank.{name}" for name in _OF_BASES if name in idle & config.lowrank.model_fields_set)


def _without_effect(config: Config) -> list[tuple[str, bool, str]]:
    """(key, whether it was set though another key switches it off, why it has no effect)."""
    low, data, train = config.lowrank, config.data, config.train
    basis = low.model_fields_set & {"proj_type", "update_proj_gap", "cos_threshold", "projector", "basis_format"}
    converted, weight_format = METHODS[config.method][:2]
    lora = config.method == "lora"
    dense = (low.weight_format or weight_format) == "none"
    idle = _idle_keys(config) if converted else ""
    of_rules = low.model_fields_set & {"rule", "scale"}
    of_auto = sorted(low.model_fields_set & {"energy", "max_rank", "mean_rank"}) if low.rank != "auto" else []
    walked = train.order != "batch_major"
    full_gradients = "full_gradients" in train.model_fields_set and low.rule == "galore" and converted
    of_muon = low.model_fields_set & {"momentum", "mu"} - set(() if lora else RULES[low.rule].reads)
    read_by_none = [name for name in _UNREAD.get(low.policy, ()) if name in low.model_fields_set and not idle]
    return [
        (", ".join(f"lowrank.{n}" for n in read_by_none), bool(read_by_none), f"with policy: {low.policy}"),
        (idle, bool(idle), "with method: lora" if lora else f"with rule: {low.rule}"),
        (
            ", ".join(f"lowrank.{n}" for n in sorted(of_muon)),
            converted and bool(of_muon),
            "with method: lora" if lora else f"with rule: {low.rule}; rule muon reads it",
        ),
        (", ".join(f"lowrank.{n}" for n in of_auto), bool(of_auto) and not idle, f"with rank: {low.rank}"),
        ("lowrank.rule, lowrank.scale", lora and bool(of_rules), "with method: lora"),
        ("lowrank.alpha", not lora and "alpha" in low.model_fields_set, "without method: lora"),
        ("train.full_gradients", full_gradients, "with rule: galore, which needs none"),
        ("train.stepping", walked and train.stepping != "auto", "where steps are layer-major (see train.order)"),
        (", ".join(f"lowrank.{n}" for n in sorted(basis)), low.rank == "full" and bool(basis), "with rank: full"),
        ("lowrank.group_size", dense and converted and "group_size" in low.model_fields_set, "without int8 weights"),
        (
            "train.min_lr_ratio",
            train.lr_schedule == "constant" and "min_lr_ratio" in train.model_fields_set,
            "with lr_schedule: constant",
        ),
        (
            "data.vocab_size",
            "vocab_size" in data.model_fields_set and data.tokenizer is not None,
            "with data.tokenizer",
        ),
        (
            "data.valid_fraction",
            "valid_fraction" in data.model_fields_set and data.valid is not None,
            "with data.valid",
        ),
        (
            "data.text_key",
            "text_key" in data.model_fields_set and all(one.task != "text" for one in data.sources.values()),
            f"with data.task: {data.task}",
        ),
        *_text_keys_not_read(data),
    ]


def _text_keys_not_read(data: DataSection) -> Iterator[tuple[str, bool, str]]:
    """A ``text_key`` of a source that has no rows, or rows of conversations; as :func:`_without_effect`."""
    for key, source in data.all_sources.items():
        if source.text_key != data.text_key:
            name = f"{key}.text_key"
            yield name, source.task != "text", f"with task: {source.task}"
            is_one_text = source.path.lower().endswith((".txt", ".txt.gz"))
            yield name, source.task == "text" and is_one_text, f"in {source.path}, which is one text without keys"


def remarks(config: Config) -> list[str]:
    """What a configuration says that its user may not expect: keys without effect, a warm-up that never ends."""
    found = []
    if not METHODS[config.method][0] and (unused := sorted(config.lowrank.model_fields_set)):
        found.append(f"method {config.method} ignores " + ", ".join(f"lowrank.{name}" for name in unused))
    for key, given, why in _without_effect(config):
        if given:
            found.append(f"{key} has no effect {why}")
    return found + never_warm(config)


def never_warm(config: Config) -> list[str]:
    """That a warm-up lasts as long as the run, where both lengths are known."""
    train = config.train
    if train.max_steps is None or train.warmup_steps < train.max_steps:
        return []
    return [f"train.warmup_steps ({train.warmup_steps}) ≥ train.max_steps: the full train.lr is never reached"]


# Keys that a resumed run may change; everything else decides what the weights become.
RESUMABLE = (
    "run.name", "run.dir", "train.max_steps", "train.epochs", "train.eval_every", "train.eval_batches",
    "train.save_every", "train.keep_last", "train.keep_every", "train.activation_checkpointing", "memory.budget",
    "memory.host_budget",
    "memory.stream", "memory.slots",
    "data.cache_dir",
    "train.keep_best", "train.early_stopping", "export.formats", "export.which", "sample.prompt",
    "sample.max_new_tokens", "tracking", "parallel", "train.stepping", "train.order",
)  # fmt: skip


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        nested = _flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {prefix + name: value}
        flat |= nested
    return flat


def differences(saved: dict[str, Any], config: Config) -> list[str]:
    """``key: saved value → value now`` for every key that differs and that a resumed run may not change."""
    # Runs made before model.attention was a key kept documents apart by a mask.
    if isinstance(model := saved.get("model"), dict):
        saved = {**saved, "model": {"attention": "sdpa", **model}}
    with suppress(ValidationError):  # a key that is younger than the run has its default
        saved = Config.model_validate(saved).model_dump(mode="json")
    old, new = _flat(saved), _flat(asked(config).model_dump(mode="json"))
    changed = [key for key in sorted({*old, *new}) if not _is_resumable(key) and old.get(key) != new.get(key)]
    pairs = [pair for key in changed for pair in _item_by_item(key, old.get(key), new.get(key))]
    return [f"{key}: {before!r} → {now!r}" for key, before, now in pairs]


def _is_resumable(key: str) -> bool:
    """Whether a resumed run may change ``key``, or the mapping in which it is a name."""
    return any(key == one or key.startswith(f"{one}.") for one in RESUMABLE)


def _item_by_item(key: str, before: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """(key, saved value, value now): of two lists of equally many sources, what differs in each of these."""
    items = [*before, *now] if isinstance(before, list) and isinstance(now, list) and len(before) == len(now) else []
    if not items or not all(isinstance(one, dict) for one in items):
        yield key, before, now
        return
    for place, (old, new) in enumerate(zip(before, now, strict=True)):
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                yield f"{key}[{place}].{name}", old.get(name), new.get(name)
