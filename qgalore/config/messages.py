"""What is wrong with a configuration, in words: the key, the value found, the rule, the remedy."""

import difflib
import json
import math
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, TypeGuard

import annotated_types
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from .. import plain_yaml
from ..errors import without_secrets
from .other_names import hint, hint_in_source
from .schema import Section, members, section_in
from .sections import Config

MOST = 20  # problems told at once: a broken file has hundreds, and all from one cause


def is_section(annotation: Any) -> TypeGuard[type[Section]]:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def keys(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """(dotted name, field) of every key, sections themselves left out."""
    for name, field in section.model_fields.items():
        if is_section(field.annotation):
            yield from keys(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def field_at(path: tuple[Any, ...]) -> FieldInfo | None:
    """The field that the names of ``path`` lead to: a section or a key; None if there is none of these names. A place
    in a list of sections, and a name in a mapping of them, belongs to the key that holds all."""
    section: type[Section] | None = Config
    inner: type[Section] | None = None
    field: FieldInfo | None = None
    for name in path:
        if inner is not None:
            section, inner = inner, None
            continue
        field = section.model_fields.get(name) if section is not None else None
        if field is None:
            return None
        section = field.annotation if is_section(field.annotation) else None
        inner = section_in(field.annotation)
    return field


def problems_of(error: ValidationError, data: Any) -> list[str]:
    """One line for each key with which pydantic found fault in ``data``."""
    by_key: dict[tuple[Any, ...], ErrorDetails] = {}
    for one in error.errors(include_url=False, include_context=False):
        location = tuple(one["loc"])
        unknown = one["type"] == "extra_forbidden"
        # Past a key, pydantic names members of unions and places in lists, which are no keys of ours.
        by_key.setdefault(location if unknown else _known_part(location), one)
    found = [_problem(location, one, data) for location, one in list(by_key.items())[:MOST]]
    if len(by_key) > MOST:
        found.append(f"and {len(by_key) - MOST} more; mend these first")
    return found


def _known_part(location: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(location) > 3 and field_at(location[:4]) is not None:
        return location[:4]
    if len(location) > 1 and isinstance(location[0], str) and isinstance(location[1], int):  # in a list at the top
        return location[:1]
    if len(location) > 1 and field_at(location[:2]) is not None:
        return location[:2]
    return location[:1]


def _problem(location: tuple[Any, ...], error: ErrorDetails, data: Any) -> str:
    name = ".".join(map(short, _spelled(location)))
    if not location:
        return f"a configuration is {shown(data)}; it must be a mapping of sections, such as train and data"
    if error["type"] == "extra_forbidden":
        holder = field_at(location[:-1]) if location[:-1] else None
        section = holder.annotation if holder is not None else Config
        if (inner := section_in(section)) is not None:
            return f"{name}: unknown key; {hint_in_source(_spelled(location), inner.model_fields)}"
        siblings = section.model_fields if is_section(section) else ()
        return f"{name}: unknown key; {hint(_spelled(location), siblings, lambda: [k for k, _ in keys()])}"
    field = field_at(location)
    assert field is not None, f"the schema has no {name}"  # of all else pydantic says that it is forbidden
    if error["type"] == "missing" and not _given(location, data):
        if is_section(field.annotation):
            return f"{name}: missing, and a run needs this section. {_section_example(name, field.annotation)}"
        return f"{name}: missing, and it has no default. Add it, for example {_assigned(name, example_of(field))}."
    value = _value_at(location, data)
    if is_section(field.annotation):
        example = _section_example(name, field.annotation)
        return f"{name} is {shown(value)}; it must be a section, that is, keys with values. {example}"
    named = _is_of_texts(field, value) or _is_like_example(field, value)
    found = short(as_yaml(value)) if named else shown(value)
    return f"{name} is {found}; it must be {rule_of(field)}. {_remedy(name, field, value)}"


def _is_of_texts(field: FieldInfo, value: Any) -> bool:
    """Whether ``value`` is a mapping of names to texts where one is taken, so that a name is what is wrong."""
    takes = any(typing.get_origin(one) is dict for one in members(field.annotation))
    return (
        takes and isinstance(value, Mapping) and all(isinstance(text, str) for text in value.values()) and bool(value)
    )


def _is_like_example(field: FieldInfo, value: Any) -> bool:
    """Whether ``value`` is a mapping with names that the key's example has, so that a value is what is wrong."""
    example = example_of(field)
    return (
        isinstance(example, Mapping) and isinstance(value, Mapping) and bool(value) and value.keys() <= example.keys()
    )


def _spelled(location: tuple[Any, ...]) -> tuple[str, ...]:
    """The names of ``location``, with the place in a list behind that of the list: data, train[0], weight. A set alone
    has no name."""
    names: list[str] = []
    for part in location:
        if isinstance(part, int) and names:
            names[-1] += f"[{part}]"
        elif part != "":
            names.append(str(part))
    return tuple(names)


def _section_example(name: str, section: type[Section]) -> str:
    first, inner = next(iter(section.model_fields.items()))
    return f"Give its keys, for example {_assigned(f'{name}.{first}', example_of(inner))}."


def _given(location: tuple[Any, ...], data: Any) -> bool:
    for part in location:
        if not isinstance(data, Mapping) or part not in data:
            return False
        data = data[part]
    return True


def _value_at(location: tuple[Any, ...], data: Any) -> Any:
    for part in location:
        # A path stands for a source, and a source for a list of one or for a set without a name.
        if isinstance(data, list) or (isinstance(data, Mapping) and part in data):
            data = data[part]
    return data


def short(text: str, most: int = 60) -> str:
    """``text`` without its secrets, cut to ``most`` signs. Half of an address would no longer tell where one ends."""
    text = without_secrets(text)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def shown(value: Any) -> str:
    """A value as it stands in a message: never a dump of a section."""
    if value is None:
        return "empty (null)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return f"a mapping of {len(value)} keys" if len(value) != 1 else "a mapping of one key"
    if isinstance(value, list | tuple):
        if any(isinstance(item, list | tuple | Mapping) for item in value) or len(value) > 8:
            return f"a list of {len(value)} values"
        return f"[{', '.join('null' if item is None else short(shown(item), 20) for item in value)}]"
    if isinstance(value, int) and abs(value) >= 10**30:
        return "a whole number of more than 30 digits"
    return short(repr(value))


def _assigned(name: str, value: Any) -> str:
    """``key=value`` as it may be given on the command line; of a section in a list, as it stands there."""
    return f"{name.rsplit('.', 1)[-1]}: {as_yaml(value)}" if "]" in name else f"{name}={as_yaml(value)}"


def as_yaml(value: Any) -> str:
    """A value in YAML's flow style, as docs and remedies show it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(as_yaml, value))}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {as_yaml(item)}" for name, item in value.items()) + "}"
    if isinstance(value, str):
        try:
            plain = plain_yaml.read(f"[{value}]") == [value]
        except plain_yaml.NotReadable:
            plain = False
        return value if plain else json.dumps(value)
    return format(value, "g") if isinstance(value, float) else str(value)


def default_of(field: FieldInfo) -> Any:
    return field.get_default(call_default_factory=True)


def extra_of(field: FieldInfo, name: str) -> Any:
    extra = field.json_schema_extra
    return extra.get(name) if isinstance(extra, dict) else None


def example_of(field: FieldInfo) -> Any:
    """A value to show for a key: the one named as example, or its default."""
    example = extra_of(field, "example")
    return default_of(field) if example is None else example


def rule_of(field: FieldInfo, far: float = math.inf) -> str:
    """What a key's value must be, in words. Bounds from ``far`` on are left out."""
    return extra_of(field, "rule") or kind_of(field.annotation, field.metadata, far)


def kind_of(annotation: Any, limits: Any = (), far: float = math.inf) -> str:
    """An annotation in words, ``limits`` being pydantic's bounds beside it. Bounds from ``far`` on are left out."""
    if typing.get_origin(annotation) is Annotated:
        inner, *beside = typing.get_args(annotation)
        bounds = [limit for one in beside for limit in (one.metadata if isinstance(one, FieldInfo) else [one])]
        return kind_of(inner, bounds, far)
    parts = [arg for arg in typing.get_args(annotation) if arg is not type(None)]
    if typing.get_origin(annotation) is Literal:
        words = [str(word) for word in parts]
        return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
    if typing.get_origin(annotation) is list:
        return f"a list of {_plural(parts[0])}"
    if typing.get_origin(annotation) is tuple:
        return f"a list of {['no', 'one', 'two', 'three'][len(parts)]} values, each {kind_of(parts[0], (), far)}"
    if parts and members(annotation) != (annotation,):
        return ", or ".join(kind_of(part, limits if len(parts) == 1 else (), far) for part in parts)
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return names.get(annotation, "a mapping") + _range(limits, far)


def words_of(one: Any) -> tuple[Any, ...]:
    return typing.get_args(one) if typing.get_origin(one) is Literal else getattr(one, "NAMES", ())


def _plural(annotation: Any) -> str:
    return "texts" if annotation is str else f"different values, each {kind_of(annotation)}"


def _range(limits: Any, far: float) -> str:
    low = high = None
    for limit in limits:
        if getattr(limit, "le", getattr(limit, "lt", 0)) >= far:
            continue
        if isinstance(limit, annotated_types.Ge):
            low = f"at least {_figure(limit.ge)}"
        elif isinstance(limit, annotated_types.Gt):
            low = f"above {_figure(limit.gt)}"
        elif isinstance(limit, annotated_types.Le):
            high = f"at most {_figure(limit.le)}"
        elif isinstance(limit, annotated_types.Lt):
            high = f"below {_figure(limit.lt)}"
        elif isinstance(limit, annotated_types.MinLen):
            return " of at least one character"
    if low and high and low.startswith("at least") and high.startswith("at most"):
        return f" {low.replace('at least', 'from')} {high.replace('at most', 'to')}"
    bounds = " and ".join(part for part in (low, high) if part)
    return f" {'of ' if bounds.startswith('at') else ''}{bounds}" if bounds else ""


def _figure(bound: Any) -> str:
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"


def _remedy(name: str, field: FieldInfo, value: Any) -> str:
    words = [str(word) for one in members(field.annotation) for word in words_of(one)]
    if isinstance(value, str) and (near := difflib.get_close_matches(value[:40].lower(), words, n=1)):
        return f"Did you mean {near[0]}?"
    if field.is_required():
        return f"Give such a value, for example {_assigned(name, example_of(field))}."
    default = default_of(field)
    if _is_like_example(field, value) and default is not None:
        return f"Give such a value, for example {_assigned(name, example_of(field))}."
    if default is None:
        shown_one = _assigned(name, example_of(field))
        return f"Give such a value, for example {shown_one}, or leave the key out ({extra_of(field, 'unset')})."
    if default in ([], {}):
        return f"Give such a value, for example {_assigned(name, example_of(field))}, or leave the key out."
    return f"Leave the key out for the default, {as_yaml(default)}."
