"""One turn of a conversation: its role, its text, and whether it is to be learned."""

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
_PAIRS = (("role", "content"), ("from", "value"))
# Whether a turn is learned, by the names that other trainers read: OpenAI's weight, axolotl's train and training, …
FLAGS = ("weight", "train", "training", "trainable", "loss", "learn")
# Keys that change what a turn says, or which part of it is learned, in ways that are not known here.
_REFUSED = (
    "tool_calls", "function_call", "tool_call_id", "reasoning_content", "reasoning", "thinking", "prefix", "mask",
    "masked", "loss_mask", "ignore", "train_detail", "training_detail", "images", "audio", "videos", "refusal",
)  # fmt: skip


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
    """What the flags of a turn or a row say; None if there are none. Raises ConfigError for shares and contradictions.

    1, 1.0 and true: it is to be learned; 0, 0.0 and false: it is not.
    """
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
    """A text, or the texts of a list of parts, each on lines of its own as servers of chat models join them.

    Raises ConfigError for anything else, an image for instance.
    """
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
        raise ConfigError(f"{where} has the {keys[0]} {short(name)}; it must be one of {', '.join(_ROLES)}.")
    role = _ROLES[name.lower()]
    for key, value in turn.items():
        if key not in (*keys, *FLAGS, *_REFUSED) and value is not None:
            notes.ignore(key, where)
    made = Turn(role=role, content=text_of(turn[keys[1]], where, keys[1]))
    learned = learns(turn, where)
    if role == "assistant" and learned is False:
        made["learn"] = False
        notes.not_learned += 1
    elif role != "assistant" and learned:
        notes.not_answers += 1
    return made
