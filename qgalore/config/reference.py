"""The reference of all keys, docs/configuration.md, written from the schema."""

from pydantic.fields import FieldInfo

from .incompatible import TABLE
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
        *(f"- Conflict: {conflict.words}" for conflict in TABLE if full in conflict.keys),
        f"- Example: `{name}: {as_yaml(example_of(field))}`",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(page(), end="")
