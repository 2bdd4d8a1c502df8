"""Conversations out of rows: messages, prompt and completion, Alpaca's keys, ShareGPT's turns."""

from collections.abc import Iterator
from typing import Any

from qgalore.data.notes import Notes, listed, short
from qgalore.data.sources import rows
from qgalore.data.turns import FLAGS, Turn, learns, pass_over, refuse_keys, text_of, turns_of
from qgalore.errors import ConfigError

Messages = list[Turn]

_EXPECTED = (
    "a row needs 'messages' (a list of role and content), 'conversations' (a list of from and value), 'prompt' and "
    "'completion', or 'instruction' and 'output' (with 'input' if there is one)"
)
# Keys that say what a model may do, is shown, or should rather not answer.
_REFUSED = (
    "functions", "documents", "images", "image", "videos", "audios", "audio", "chosen", "rejected", "mask",
    "loss_mask", "chat_template_kwargs", "chat_template",
)  # fmt: skip
_LAYOUTS = (("messages",), ("conversations",), ("prompt", "completion"), ("instruction", "output"))
_SYSTEM = ("system", "system_prompt")
# What a row holds that is none of these layouts, and what to do with it.
_REMEDIES = {
    "text": "For plain text, which is learned whole, set data.task=text.",
    "segments": "Put what is masked into 'prompt' and what is learned into 'completion'; the chat template is added.",
    "input_ids": "Tokens made elsewhere are not read; give the texts that they were made of.",
}
# Our key, and what other layouts call it.
_CALLED = (("instruction", ("question", "query")), ("input", ("context",)), ("output", ("response", "answer")))


def conversations(source: str, *, split: str = "train", notes: Notes | None = None) -> Iterator[tuple[Messages, str]]:
    """Stream the conversations of ``source`` (see ``sources.rows``), each with a description of its place, as
    :func:`messages_of` reads them; never an empty one. notes: gets what is left out, changed or not read. Raises
    ConfigError."""
    notes = Notes() if notes is None else notes
    found = False
    for row, where in rows(source, split=split, notes=notes):
        found = True
        yield messages_of(row, where, notes), where
    if not found:
        raise ConfigError(f"data source {source!r} has no rows (it is empty); {_EXPECTED}.")


def messages_of(row: dict[str, Any], where: str, notes: Notes | None = None) -> Messages:
    """The conversation in ``row``, which is at ``where``: the first of these layouts that its keys match.

    ``messages``: role and content, or ``conversations``: from and value, with ShareGPT's names of roles; ``prompt`` and
    ``completion``, texts or lists of turns, of which those of the prompt are not learned; Alpaca's ``instruction``,
    ``input`` and ``output``, with earlier questions and answers in ``history``. Beside any of them ``system`` is the
    first turn, and a false ``train`` or a ``weight`` of 0 says that none of the answers is learned.

    Raises ConfigError for any other row, and for keys with a meaning that is not supported, such as tools and images.
    """
    notes = Notes() if notes is None else notes
    if row.get("tools") not in (None, [], "", "[]"):
        raise ConfigError(f"{where} offers tools, which is not supported; leave such conversations out.")
    refuse_keys(row, _REFUSED, where)
    if row.get("label") is False:
        raise ConfigError(f"{where}: 'label' is False, which marks an answer to be avoided; leave such rows out.")
    _one_layout(row, where)
    used, messages = _layout(row, where, notes)
    messages = _with_system(row, messages, where)
    if learns(row, where) is False:
        for turn in messages:
            if turn["role"] == "assistant" and turn.get("learn", True):
                turn["learn"] = False
                notes.not_learned += 1
    pass_over(row, (*used, *_SYSTEM, *FLAGS, *_REFUSED, "tools"), where, notes)
    return messages


def _one_layout(row: dict[str, Any], where: str) -> None:
    """Raise ConfigError for a row with two conversations, of which one would be dropped."""
    full = [pair for pair in _LAYOUTS if all(row.get(key) not in (None, [], "") for key in pair)]
    if len(full) > 1:
        names = " and ".join("/".join(pair) for pair in full)
        raise ConfigError(f"{where} has two conversations ({names}), and only one can be learned; keep one of them.")


def _layout(row: dict[str, Any], where: str, notes: Notes) -> tuple[tuple[str, ...], Messages]:
    """The keys that were read, and the turns in them."""
    for key in ("messages", "conversations"):
        if row.get(key) is not None:
            if row.get("history"):
                raise ConfigError(f"{where} has 'history' beside {key!r}; put the earlier turns into {key!r}.")
            return (key, "history"), turns_of(row[key], f"{where}: {key!r}", notes)
    if row.get("prompt") is not None and row.get("completion") is not None:
        return ("prompt", "completion", "history", "label"), _completed(row, where, notes)
    if row.get("instruction") is not None and row.get("output") is not None:
        question = text_of(row["instruction"], where, "instruction")
        if row.get("input") not in (None, ""):
            given = text_of(row["input"], where, "input")
            question = f"{question}\n\n{given}" if question else given
        exchange = _exchange(question, text_of(row["output"], where, "output"))
        return ("instruction", "input", "output", "history"), _history(row, where) + exchange
    raise ConfigError(f"{where} has the keys {listed(row)}; {_EXPECTED}. {_remedy(row)}".rstrip())


def _remedy(row: dict[str, Any]) -> str:
    """What to do with a row that has no layout which is read; "" if that is not known."""
    if known := next((remedy for key, remedy in _REMEDIES.items() if row.get(key) is not None), None):
        return known
    if row.get("prompt") is not None:
        return "Rename 'response' to 'completion'." if row.get("response") is not None else ""
    given = {ours: next((key for key in (ours, *other) if row.get(key) is not None), None) for ours, other in _CALLED}
    if given["instruction"] is None or given["output"] is None:
        return ""
    return f"Rename {' and '.join(f'{key!r} to {ours!r}' for ours, key in given.items() if key not in (None, ours))}."


def _completed(row: dict[str, Any], where: str, notes: Notes) -> Messages:
    prompt, completion = row["prompt"], row["completion"]
    label = row.get("label")
    if label is not None and (not isinstance(label, (bool, int)) or label != 1):
        raise ConfigError(
            f"{where}: 'label' is {short(label)}; beside a completion it must be true, which marks a good answer. "
            "Leave rows with other labels out."
        )
    if not (_turns_in(prompt) or _turns_in(completion)):
        question = text_of(prompt, where, "prompt")
        return _history(row, where) + _exchange(question, text_of(completion, where, "completion"))
    before = turns_of(prompt, f"{where}: 'prompt'", notes) if _turns_in(prompt) else [_user(prompt, where, "prompt")]
    for turn in before:
        if turn["role"] == "assistant":
            turn["learn"] = False
    if _turns_in(completion):
        return _history(row, where) + before + turns_of(completion, f"{where}: 'completion'", notes)
    answer = Turn(role="assistant", content=text_of(completion, where, "completion"))
    return [*_history(row, where), *before, answer]


def _turns_in(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(one, dict) and ("role" in one or "from" in one) for one in value)


def _user(value: Any, where: str, key: str) -> Turn:
    return Turn(role="user", content=text_of(value, where, key))


def _exchange(question: str, answer: str) -> Messages:
    return [Turn(role="user", content=question), Turn(role="assistant", content=answer)]


def _history(row: dict[str, Any], where: str) -> Messages:
    """The earlier questions and answers of a row, a list of pairs."""
    history = row.get("history") or []
    pairs = isinstance(history, list) and all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
        for pair in history
    )
    if not pairs:
        raise ConfigError(f"{where}: 'history' must be a list of pairs, each an earlier question and its answer.")
    return [turn for pair in history for turn in _exchange(*pair)]


def _with_system(row: dict[str, Any], messages: Messages, where: str) -> Messages:
    given = {key: text_of(row[key], where, key) for key in _SYSTEM if row.get(key) not in (None, "")}
    if len(set(given.values())) > 1:
        raise ConfigError(f"{where}: {' and '.join(map(repr, given))} differ; keep one of them.")
    for key, content in given.items():
        if messages[0]["role"] != "system":
            messages = [Turn(role="system", content=content), *messages]
        elif messages[0]["content"] != content:
            raise ConfigError(
                f"{where}: {key!r} says something else than the system turn of the conversation; keep one of them."
            )
    return messages
