"""Attributes that have another value for a while."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(changes: Iterable[tuple[Any, str, Any]]) -> Iterator[None]:
    """Inside, the attribute ``name`` of each ``owner`` is ``value``, for the (owner, name, value) of ``changes``."""
    changes = list(changes)
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        # The last change is undone first, so that what was changed twice is again as it was.
        for owner, name, value in reversed(before):
            setattr(owner, name, value)
