"""The reference of all keys, docs/configuration.md, written from the schema."""

import re
import shlex
import typing
from collections.abc import Iterator
from typing import Any

from pydantic.fields import FieldInfo

from .incompatible import TABLE
from .messages import as_yaml, default_of, example_of, extra_of, is_section, keys, rule_of, words_of
from .schema import members
from .sections import METHODS, Config

FAR = 2**20  # upper bounds from here on only keep out nonsense, and no user asks for them

EXAMPLE = """\
run:
  name: mine
model:
  config: llama_60m
data:
  train: my_text.jsonl
train:
  max_steps: 1000
  lr: 0.001
"""

_BEGINNING = """\
# Configuration

This page is generated from the schema in `qgalore/config`. Do not edit it.
Write it again with `python -m qgalore.config.reference > docs/configuration.md`.

A configuration is a YAML file with the sections below. This is a whole one.

{example}
Any key can be given on the command line as well, for example `train.lr=0.001`.
The keys `data.train` and `train.lr` must be given. So must one of `train.max_steps` and `train.epochs`, and one of
`model.config` and `model.path`.
All other keys have a default. Numbers may be written as `1e-5`.
A key that is not listed here is refused, and the message names the key that is probably meant.

For each key this page gives its meaning, type, unit, default, conflicts with other keys, and an example.
Upper limits that no run reaches are left out.

The sections are {sections}.
"""

_METHODS = """\
| method | low-rank layers | their weights | their bases | optimizer |
|---|---|---|---|---|
"""


def page() -> str:
    inner = {name: field for name, field in Config.model_fields.items() if is_section(field.annotation)}
    links = [f"[{name}](#{name})" for name in inner]
    example = "".join(f"    {line}\n" for line in EXAMPLE.splitlines())
    parts = [
        _BEGINNING.format(example=example, sections=f"{', '.join(links[:-1])} and {links[-1]}"),
        "## At the top\n",
        *(_entry(name, field) for name, field in Config.model_fields.items() if name not in inner),
    ]
    for name, field in inner.items():
        parts.append(f"## {name}\n\n{field.description}\n")
        section: Any = field.annotation  # is_section has said so
        parts += [_entry(f"{name}.{one}", of_it) for one, of_it in section.model_fields.items()]
    return "\n".join(parts)


def _entry(name: str, field: FieldInfo) -> str:
    unit = extra_of(field, "unit")
    lines = [
        f"### `{name}`",
        "",
        _with_keys_marked(field.description or ""),
        "",
        *([_methods()] if name == "method" else []),
        f"- Type: {_type(field)}.",
        *([f"- Unit: {unit}."] if unit else []),
        f"- Default: {_default(field)}.",
        *(f"- Conflict: {conflict.words}" for conflict in TABLE if name in conflict.keys),
        f"- Example: `{name}={shlex.quote(as_yaml(_example(field)))}`.",
        "",
    ]
    return "\n".join(lines)


def _type(field: FieldInfo) -> str:
    words = rule_of(field, FAR).replace("text of at least one character", "text")
    literal = [re.escape(word) for word in _literals(field.annotation) if isinstance(word, str)]
    return re.sub(rf"\b({'|'.join(literal)}|true|false)\b", r"`\1`", words) if literal else words


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "none, the key must be given"
    if default_of(field) is None:
        return f"not set, which means {_with_keys_marked(extra_of(field, 'unset'))}"
    return f"`{as_yaml(default_of(field))}`"


def _example(field: FieldInfo) -> Any:
    """The example of the schema, or else a value that is not the default, where a type names its values."""
    default = None if field.is_required() else default_of(field)
    if extra_of(field, "example") is not None or default is None:
        return example_of(field)
    if field.annotation is bool:
        return not default
    return next((word for word in _literals(field.annotation) if word != default), default)


def _literals(annotation: Any) -> Iterator[Any]:
    """The values that ``annotation`` names, those of a list's items too."""
    for one in members(annotation):
        yield from words_of(one)
        if typing.get_origin(one) is list:
            yield from _literals(typing.get_args(one)[0])


def _with_keys_marked(text: str) -> str:
    """``text`` with the names of keys set as code."""
    names = "|".join(re.escape(name) for name, _ in keys() if "." in name)
    return re.sub(rf"(?<![`\w.])({names})(?![`\w.]\w|\w)", r"`\1`", text)


def _methods() -> str:
    rows = [
        f"| `{name}` | {'yes' if converted else 'no'} | {weights if weights == 'int8' else 'floating point'} | "
        f"{(bases or 'floating point') if converted and name != 'lora' else '–'} | `{optimizer}` |"
        for name, (converted, weights, bases, optimizer) in METHODS.items()
    ]
    return _METHODS + "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(page(), end="")
