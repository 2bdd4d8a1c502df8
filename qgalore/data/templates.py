"""Rendering conversations with a tokenizer's chat template, and what the template writes after an answer."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime, time

from transformers import PreTrainedTokenizerBase

from qgalore.data.turns import Turn
from qgalore.errors import ConfigError

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TODAY = re.compile(r"""strftime_now\(\s*("[^"\\]*"|'[^'\\]*')\s*\)""")
_ANY_TODAY = re.compile(r"strftime_now\s*\(")
_PROBE = "\N{LEFTWARDS ARROW}answer\N{RIGHTWARDS ARROW}"  # what no template and no row says


def template_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template that conversations without tools are written with. Raises ConfigError if there is none."""
    if not tokenizer.chat_template:
        raise ConfigError(f"tokenizer {tokenizer.name_or_path!r} has no chat template; set its chat_template.")
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:  # several by name, and none for this
        raise ConfigError(f"tokenizer {tokenizer.name_or_path!r}: {str(error).splitlines()[0]}") from error


def writes_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    return bool(tokenizer.chat_template) and _ANY_TODAY.search(template_text(tokenizer)) is not None


def _at(template: str, day: date) -> str:
    """``template`` with ``day`` where it would ask for today's date. Raises ConfigError where it cannot be put."""
    now = datetime.combine(day, time())
    fixed = _TODAY.sub(lambda match: repr(now.strftime(match[1][1:-1])), template)
    if _ANY_TODAY.search(fixed):
        raise ConfigError(
            "the chat template writes today's date in a format that it computes, so that a run resumed on another day "
            "would see other texts; write the format as a text in strftime_now('…'), or take it out."
        )
    return fixed


@dataclass(frozen=True)
class Ending:
    """What a template writes after an answer. ``tail``: all of it; ``own``: its beginning, up to the mark that ends the
    answer, or all that is not the next prompt; ``marked``: whether there is such a mark."""

    tail: str
    own: str
    marked: bool


class Template:
    """A tokenizer's chat template. ``tagged``: it has ``{% generation %}`` blocks, which say what an answer is.
    ``known``: the last ending that was found."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, day: date | None = None) -> None:
        """``day``: the date that the template writes; None: today's. Raises ConfigError if there is no template."""
        self.tokenizer = tokenizer
        text = template_text(tokenizer)
        self._text = text if day is None else _at(text, day)
        self.known: Ending | None = None
        self.tagged = _GENERATION.search(text) is not None
        self._marks = [mark for mark in tokenizer.get_added_vocab() if mark.strip()]

    def apply(self, messages: Sequence[Turn], where: str, **options):
        """transformers' ``apply_chat_template``. Raises ConfigError, naming the place, for whatever goes wrong."""
        said = [{"role": turn["role"], "content": turn["content"]} for turn in messages]
        try:
            return self.tokenizer.apply_chat_template(said, chat_template=self._text, **options)
        except Exception as error:  # a template is a program of somebody else's, and may fail in any way
            roles = ", ".join(turn["role"] for turn in messages)
            what = (str(error).splitlines() or [""])[0]
            raise ConfigError(
                f"{where}: the tokenizer's chat template refuses this conversation ({roles}): {what} "
                f"({type(error).__name__}). Change the row, or give a tokenizer whose template takes it."
            ) from error

    def render(self, messages: Sequence[Turn], where: str, *, prompt: bool = False) -> str:
        """The conversation as text; ``prompt``: with what asks for the next answer."""
        text = self.apply(messages, where, tokenize=False, add_generation_prompt=prompt)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"{where}: the chat template writes a lone surrogate, which is no character.") from error
        return text

    def opening(self, where: str) -> str:
        """What is written before an answer that is the first turn of a conversation."""
        text = self.render([Turn(role="assistant", content=_PROBE)], where)
        return text[: max(text.find(_PROBE), 0)]

    def ending(self, before: Sequence[Turn], where: str) -> Ending:
        """What is written after an answer that follows ``before`` and is the last turn. Raises ConfigError where the
        next prompt is written unasked and cannot be told from a mark at the answer's end."""
        text = self.render([*before, Turn(role="assistant", content=_PROBE)], where)
        place = text.rfind(_PROBE)
        tail = text[place + len(_PROBE) :] if place >= 0 else ""
        blank = len(tail) - len(tail.lstrip())
        if marks := [mark for mark in self._marks if tail.startswith(mark, blank)]:
            # What follows the mark may be the next prompt, or end the whole text (Phi 3.5) and not the turn.
            self.known = Ending(tail, tail[: blank + max(map(len, marks))], True)
            return self.known
        if not tail.strip() or not before:
            return Ending(tail, tail, False)
        asked, unasked = self.render(before, where, prompt=True), self.render(before, where)
        same = _common_end(unasked, tail)
        at_once = not text.removeprefix(unasked)[: max(place - len(unasked), 0)].strip()
        if asked == unasked and at_once and same.strip():
            raise ConfigError(
                f"{where}: the chat template writes the next prompt after an answer ({same.strip()!r}) although none "
                "is asked for; write that part inside {% if add_generation_prompt %} … {% endif %}."
            )
        return Ending(tail, tail, True)


def _common_end(one: str, other: str) -> str:
    count = next((i for i, (a, b) in enumerate(zip(one[::-1], other[::-1], strict=False)) if a != b), None)
    count = min(len(one), len(other)) if count is None else count
    return other[len(other) - count :]
