"""What a key and a section are, and the questions that messages and the reference ask of them."""

import types
import typing
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

STEPS = 2**40  # more optimizer steps, tokens or saves than any run has
SIDE = 2**20  # more rows, columns, tokens of a sequence or ranks than any model has


def key(
    default: Any,
    meaning: str,
    *,
    unit: str | None = None,
    rule: str | None = None,
    example: Any = None,
    unset: str | None = None,
    **limits: Any,
) -> Any:
    """A key's default (``...``: none, it must be given) and what docs and messages say of it. ``rule``: what a value
    must be, where types and ``limits`` do not say it; ``example``: a value to show, where the default shows none;
    ``unset``: what None stands for."""
    extra = {"unit": unit, "rule": rule, "example": example, "unset": unset}
    return Field(default, description=meaning, json_schema_extra=extra, **limits)


def members(annotation: Any) -> tuple[Any, ...]:
    """The types that a value of ``annotation`` may have, without None: those of a union, or itself."""
    if typing.get_origin(annotation) is Annotated:
        return members(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(one for arg in typing.get_args(annotation) for one in members(arg) if arg is not type(None))
    return (annotation,)


def is_textual(annotation: Any) -> bool:
    """Whether every value of ``annotation`` is text, or a list or mapping of texts; sections in one may stand for
    texts there."""

    def textual(one: Any) -> bool:
        if typing.get_origin(one) in (list, dict):
            return is_textual(typing.get_args(one)[-1]) or section_in(one) is not None
        if typing.get_origin(one) is Literal:
            return all(isinstance(word, str) for word in typing.get_args(one))
        return one is str

    return all(map(textual, members(annotation)))


def section_in(annotation: Any) -> "type[Section] | None":
    """The section of which a value of ``annotation`` may be a list or a mapping, if there is one."""
    for one in members(annotation):
        item = typing.get_args(one)[-1] if typing.get_origin(one) in (list, dict) else None
        if isinstance(item, type) and issubclass(item, Section):
            return item
    return None


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _of_one_kind(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic would read ``rank: true`` as 1 and ``keep_best: 1`` as true, and refuse 2024 as a name."""
        assert info.field_name is not None  # as for every validator of fields
        annotation = cls.model_fields[info.field_name].annotation
        allowed = members(annotation)
        truth_values, number = bool in allowed, isinstance(value, int | float) and not isinstance(value, bool)
        if isinstance(value, bool) and not truth_values:
            raise ValueError("a truth value")
        counted = int in allowed and isinstance(value, int)
        if truth_values and not isinstance(value, bool) and ((number and not counted) or allowed == (bool,)):
            raise ValueError("no truth value")
        if isinstance(value, int) and number and is_textual(annotation):
            return str(value)
        return value


def once(values: list[str]) -> list[str]:
    """``values``, if none of them is there twice; raises ``ValueError``."""
    if len(set(values)) < len(values):
        raise ValueError("a value is named twice")
    return values


Once = AfterValidator(once)
