"""One turn of a conversation: its role, its text, and whether it is to be learned."""

import re
from collections.abc import Container
from typing import Any, TypedDict

from qgalore.data.notes import Notes, listed, short
from qgalore.errors import ConfigError


class _Said(TypedDict):
    role: str
    content: str


class Turn(_Said, total=False):
    """``learn`` is there, and False, for an assistant's turn that is not to be learned."""

    learn: bool


_ROLES = {
    "system": "system", "developer": "system", "user": "user", "assistant": "assistant",
    "human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant",
}  # fmt: skip
_TOOLS = ["tool", "function", "function_call", "observation", "ipython"]  # a list, as a role may be unhashable
_PAIRS = (("role", "content"), ("from", "value"))
_READ = (
    "role",
    "content",
    "from",
    "value",
    "system",
    "history",
    "input",
    "output",
    "instruction",
    "prompt",
    "completion",
)
# Whether a turn is learned, by the names that other trainers read: OpenAI's weight, axolotl's train and training, …
FLAGS = ("weight", "train", "training", "trainable", "loss", "learn")
# Keys that change what a turn says, or which part of it is learned, in ways that are not known here.
_REFUSED = (
    "tool_calls", "function_call", "tool_call_id", "reasoning_content", "reasoning", "thinking", "prefix", "mask",
    "masked", "loss_mask", "ignore", "train_detail", "training_detail", "images", "audio", "videos", "refusal",
)  # fmt: skip


# Words in the name of a key by which a turn, or a part of it, would be learned otherwise or say something else.
_MEANT = {
    *("weight", "weights", "train", "training", "trainable", "loss", "mask", "masked", "learn", "learned", "ignore"),
    *("ignored", "skip", "exclude", "excluded", "supervise", "supervised", "kto", "prefill", "system", "sys"),
    *("context", "history", "tool", "tools", "function", "functions", "thought", "thoughts", "thinking"),
    *("reasoning", "image", "images", "audio", "video", "videos", "reject", "rejected", "chosen"),
}  # fmt: skip
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")


def pass_over(row: dict[str, Any], read: Container[str], where: str, notes: Notes) -> None:
    """Count the keys of a row or turn that are not in ``read``. Raises ConfigError for one whose name says that it
    changes what is said or learned: only such keys may be passed over as do not matter here."""
    for key, value in row.items():
        if key in read or value in (None, "", "[]") or value == [] or value == {}:
            continue
        words = {word.lower() for word in _WORD.findall(key)}
        near = next((name for name in (*_READ, *FLAGS) if name == key.lower().strip()), None)
        if near is not None and near != key:
            raise ConfigError(f"{where} has the key {short(key)}, which is not read; write it as {near!r}.")
        if words & _MEANT or (value is False and words & {"label", "labels"}):
            raise ConfigError(
                f"{where} has the key {short(key)} (it is {short(value)}), which is not read, and by its name it "
                "changes what is said or learned. Take it out if it does not matter; what is read is "
                f"{listed(FLAGS)} and 'system'."
            )
        notes.ignore(key, where)


def refuse_keys(row: dict[str, Any], keys: tuple[str, ...], where: str) -> None:
    """Raise ConfigError for a key of ``keys`` whose value says something."""
    for key in keys:
        if row.get(key) not in (None, [], "", "[]", {}, False):
            what = "calls tools" if key in ("tool_calls", "function_call", "tool_call_id") else f"has the key {key!r}"
            raise ConfigError(
                f"{where} {what}, which is not supported; leave such rows out, or take the key out if it does not "
                f"matter (it is {short(row[key])})."
            )


def learns(row: dict[str, Any], where: str) -> bool | None:
    """What the flags of a turn or a row say, by 1 or true and 0 or false; None if there are none. Raises ConfigError
    for shares and contradictions."""
    given = {key: row[key] for key in FLAGS if row.get(key) is not None}
    for key, value in given.items():
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise ConfigError(
                f"{where}: {key!r} is {short(value)}; it must be 1 or true (to be learned), or 0 or false (not)."
            )
    if len({bool(value) for value in given.values()}) > 1:
        raise ConfigError(f"{where}: {' and '.join(map(repr, given))} contradict each other; keep one of them.")
    return bool(next(iter(given.values()))) if given else None


def text_of(value: Any, where: str, key: str) -> str:
    """A text, or the texts of a list of parts, each on lines of its own as servers of chat models join them. Raises
    ConfigError for anything else, an image for instance."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ConfigError(f"{where}: {key!r} is of type {type(value).__name__}; it must be text, or a list of texts.")
    texts = []
    for part in value:
        text, kind = part, "text"
        if isinstance(part, dict):
            text, kind = part.get("text"), part.get("type") or "text"
            if other := [name for name, held in part.items() if name not in ("type", "text") and held is not None]:
                raise ConfigError(
                    f"{where}: {key!r} has a part with {short(other[0])}, which is not supported; only text is."
                )
        if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
            raise ConfigError(
                f"{where}: {key!r} has a part of type {short(kind)} that is no text; only text is supported."
            )
        texts.append(text)
    return "\n".join(texts)


def turns_of(turns: Any, where: str, notes: Notes) -> list[Turn]:
    """The turns of a list of dictionaries with role and content, or from and value. Raises ConfigError for others."""
    if not isinstance(turns, list) or not turns:
        raise ConfigError(f"{where} is {'empty' if turns == [] else type(turns).__name__}; it must be a list of turns.")
    return [_turn(turn, f"{where}, turn {number}", notes) for number, turn in enumerate(turns, start=1)]


def _turn(turn: Any, where: str, notes: Notes) -> Turn:
    if not isinstance(turn, dict):
        raise ConfigError(
            f"{where} is of type {type(turn).__name__}; it must have role and content, or from and value."
        )
    refuse_keys(turn, _REFUSED, where)
    keys = next((pair for pair in _PAIRS if all(turn.get(key) is not None for key in pair)), None)
    if keys is None:
        raise ConfigError(f"{where} has the keys {listed(turn)}; it needs role and content, or from and value.")
    name = turn[keys[0]]
    if not isinstance(name, str) or name.lower() not in _ROLES:
        tools = " Tools are not supported; leave such conversations out." if name in _TOOLS else ""
        raise ConfigError(f"{where} has the {keys[0]} {short(name)}; it must be one of {', '.join(_ROLES)}.{tools}")
    role = _ROLES[name.lower()]
    for own, other in zip(keys, _PAIRS[1 - _PAIRS.index(keys)], strict=True):
        if turn.get(other) not in (None, turn[own]):
            raise ConfigError(f"{where} has {own!r} and {other!r}, which say different things; keep one of them.")
    pass_over(turn, (*_PAIRS[0], *_PAIRS[1], *FLAGS, *_REFUSED), where, notes)
    made = Turn(role=role, content=text_of(turn[keys[1]], where, keys[1]))
    learned = learns(turn, where)
    if role == "assistant" and learned is False:
        made["learn"] = False
        notes.not_learned += 1
    elif role != "assistant" and learned:
        notes.not_answers += 1
    return made
