"""The reference of all keys, docs/configuration.md, written from the schema."""

from pydantic.fields import FieldInfo

from .messages import as_yaml, default_of, example_of, extra_of, is_section, rule_of
from .sections import Config, Section

_BEGINNING = """\
# Configuration

This page is generated from the schema in `qgalore/config/sections.py`. Do not edit it. Write it again with
`python -m qgalore.config.reference > docs/configuration.md`.

A configuration is a YAML file with the sections below. Any key can be given on the command line as well, for example
`train.lr=0.001`. Only `data.train`, `train.max_steps`, `train.lr` and one of `model.config` and `model.path` must be
given. Numbers may be written as `1e-5`. A key that is not listed here is refused, and the message names the key that is
probably meant.
"""


def page() -> str:
    """The page as Markdown."""
    top = {name: field for name, field in Config.model_fields.items() if not is_section(field.annotation)}
    parts = [_BEGINNING, "## At the top\n", *(_entry(name, name, field) for name, field in top.items())]
    for name, field in Config.model_fields.items():
        if is_section(field.annotation):
            parts.append(f"## {name}\n\n{field.description}\n")
            parts += _entries(name, field.annotation)
    return "\n".join(parts)


def _entries(section: str, schema: type[Section]) -> list[str]:
    return [_entry(f"{section}.{name}", name, field) for name, field in schema.model_fields.items()]


def _entry(full: str, name: str, field: FieldInfo) -> str:
    default = "must be given" if field.is_required() else f"`{as_yaml(default_of(field)) or '[]'}`"
    if not field.is_required() and default_of(field) is None:
        default = f"not set ({extra_of(field, 'unset')})"
    unit = extra_of(field, "unit")
    lines = [
        f"### `{full}`",
        "",
        field.description,
        "",
        f"- Value: {rule_of(field)}",
        *([f"- Unit: {unit}"] if unit else []),
        f"- Default: {default}",
        *(f"- Conflict: {text}" for text in CONFLICTS.get(full, ())),
        f"- Example: `{name}: {as_yaml(example_of(field))}`",
        "",
    ]
    return "\n".join(lines)


# What a key does not go together with; ``Config.problems`` refuses each of these.
CONFLICTS = {
    "model.config": ("give one of `model.config` and `model.path`",),
    "model.path": ("give one of `model.config` and `model.path`",),
    "model.overrides": ("goes with `model.config` only",),
    "model.compute": ("`int8` needs trained int8 weights and `lowrank.group_size: row`",),
    "model.compile": (
        "`blocks` does not go with `train.activation_checkpointing: offload` or `lowrank.rank: auto`",
        "`blocks` does not go with `parallel: shard`",
    ),
    "parallel": (
        "`shard` needs method qgalore, galore or galore8bit, `lowrank.rule: galore`, a right basis "
        "(`lowrank.proj_type: right`), a number as rank, deferred stepping and Adam",
    ),
    "train.stepping": ("`fused` does not go with `train.clip_grad_norm` or several micro-batches in a process",),
    "train.clip_grad_norm": ("a rule with whole gradients needs `train.full_gradients: keep` for it",),
    "train.grad_accumulation": ("a rule with whole gradients needs `train.full_gradients: keep` for it",),
    "train.betas": ("goes with adamw8bit, adamw4bit and adamw; others take `train.optimizer_options`",),
    "train.eps": ("goes with adamw8bit, adamw4bit and adamw; others take `train.optimizer_options`",),
    "train.weight_decay": ("must be below 1 / `train.lr`",),
    "lowrank.rank": (
        "`auto` goes with `rule: galore` and one-sided projection only",
        "`full` and `auto` do not go with method lora; `full` does not with rule apollo",
    ),
    "lowrank.mean_rank": ("must be at most `lowrank.max_rank`",),
    "lowrank.max_gap": ("must be at least `lowrank.update_proj_gap`",),
    "lowrank.similarity": ("does not go with `lowrank.policy`",),
    "lowrank.weight_rounding": ("`feedback` needs `rule: galore`, Adam and a first beta above 0",),
    "lowrank.embeddings": ("`int8` does not go with method lora or `parallel: shard`",),
    "export.formats": ("`int8` needs int8 weights; a classifier and method lora are exported as `hf` only",),
    "export.which": ("`best` needs `train.keep_best: true`",),
    "data.label_key": ("goes with `data.task: classify` only",),
    "data.label_type": ("goes with `data.task: classify` only",),
    "data.header": ("goes with `data.task: classify` only",),
    "data.metric": ("goes with `data.task: classify` only, and must suit `data.label_type`",),
    "data.valid": ("`data.task: classify` needs it",),
}


if __name__ == "__main__":
    print(page(), end="")
