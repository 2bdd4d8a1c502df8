"""Conversations out of rows: messages, prompt and completion, Alpaca's keys, ShareGPT's turns."""

from collections.abc import Iterator
from typing import Any

from qgalore.data.sources import rows
from qgalore.errors import ConfigError

Messages = list[dict[str, str]]

_ROLES = {
    "system": "system", "user": "user", "assistant": "assistant",
    "human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant",
}  # fmt: skip
_EXPECTED = (
    "a row needs 'messages' (a list of role and content), 'conversations' (a list of from and value), 'prompt' and "
    "'completion', or 'instruction' and 'output' (with 'input' if there is one)"
)


def conversations(source: str, *, split: str = "train") -> Iterator[tuple[Messages, str]]:
    """Stream the conversations of ``source`` (see ``sources.rows``), each with a description of its place.

    A conversation is a list of ``{"role": "system" | "user" | "assistant", "content": text}``, never empty.
    Raises ConfigError as ``rows`` and ``messages_of`` do, and for a source without a row.
    """
    found = False
    for row, where in rows(source, split=split):
        found = True
        yield messages_of(row, where), where
    if not found:
        raise ConfigError(f"data source {source!r} has no rows (it is empty); {_EXPECTED}.")


def messages_of(row: dict[str, Any], where: str) -> Messages:
    """The conversation in ``row``, which is at ``where``: the first of these layouts that its keys match.

    ``messages``: role and content, or ``conversations``: from and value, with ShareGPT's names of roles (either pair
    of keys in either list); ``prompt`` and ``completion``; Alpaca's ``instruction``, ``input`` (may be absent or
    empty) and ``output``. Raises ConfigError, naming the place and what was expected, for any other row.
    """
    if row.get("tools") not in (None, [], "", "[]"):
        raise ConfigError(f"{where} offers tools, which is not supported; leave such conversations out.")
    for key in ("messages", "conversations"):
        if row.get(key) is not None:
            return _turns(row[key], f"{where}: {key!r}")
    if row.get("prompt") is not None and row.get("completion") is not None:
        return _exchange(_text(row, "prompt", where), _text(row, "completion", where))
    if row.get("instruction") is not None and row.get("output") is not None:
        question = _text(row, "instruction", where)
        if row.get("input"):
            question += "\n\n" + _text(row, "input", where)
        return _exchange(question, _text(row, "output", where))
    raise ConfigError(f"{where} has the keys {', '.join(map(repr, row)) or 'none'}; {_EXPECTED}.")


def _exchange(question: str, answer: str) -> Messages:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _text(row: dict[str, Any], key: str, where: str) -> str:
    if not isinstance(row[key], str):
        raise ConfigError(f"{where}: {key!r} is of type {type(row[key]).__name__}; it must be text.")
    return row[key]


def _turns(turns: Any, where: str) -> Messages:
    if not isinstance(turns, list) or not turns:
        raise ConfigError(f"{where} is {'empty' if turns == [] else type(turns).__name__}; it must be a list of turns.")
    return [_turn(turn, f"{where}, turn {number}") for number, turn in enumerate(turns, start=1)]


def _turn(turn: Any, where: str) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise ConfigError(
            f"{where} is of type {type(turn).__name__}; it must have role and content, or from and value."
        )
    keys = next((pair for pair in (("role", "content"), ("from", "value")) if all(key in turn for key in pair)), None)
    if keys is None:
        present = ", ".join(map(repr, turn)) or "none"
        raise ConfigError(f"{where} has the keys {present}; it needs role and content, or from and value.")
    role = turn[keys[0]]
    if not isinstance(role, str) or role not in _ROLES:
        raise ConfigError(f"{where} has the {keys[0]} {role!r}; it must be one of {', '.join(_ROLES)}.")
    if turn.get("tool_calls"):
        raise ConfigError(f"{where} calls tools, which is not supported; leave such conversations out.")
    return {"role": _ROLES[role], "content": _text(turn, keys[1], where)}
