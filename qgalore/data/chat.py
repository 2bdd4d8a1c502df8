"""Conversations as tokens, with a mark on every token that an assistant would have to say."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date

import numpy as np
from transformers import PreTrainedTokenizerBase

from qgalore.data.conversations import Messages
from qgalore.data.templates import Template
from qgalore.data.turns import Turn
from qgalore.errors import ConfigError

# For a tokenizer without a template of its own. An answer ends with the end-of-text token: a model must learn to stop.
PLAIN_TEMPLATE = (
    "{% if bos_token is defined and bos_token and bos_token != eos_token %}{{ bos_token }}{% endif %}"
    "{% for message in messages %}"
    "{{ '### ' + message['role'] | capitalize + ':\\n' + message['content'] | trim }}"
    "{{ eos_token if message['role'] == 'assistant' else '' }}{{ '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Rendered:
    """One conversation: ``ids`` (n,) int64, and ``answer`` (n,) bool, whether a token is the assistant's to say.
    ``endless``: how many of its answers end without a mark."""

    ids: np.ndarray
    answer: np.ndarray
    endless: int = 0


def has_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    return bool(tokenizer.chat_template)


def encode(
    tokenizer: PreTrainedTokenizerBase,
    batch: Sequence[tuple[Messages, str]],
    day: date | None = None,
    longest: int | None = None,
) -> list[Rendered]:
    """The conversations of ``batch`` (each with its place, for errors) rendered with the tokenizer's chat template.

    The text is tokenized whole, as it is. A token is part of an answer if it begins in one; see :func:`answer_spans`.
    Where the template has ``{% generation %}`` blocks, these say what an answer is. ``day`` is the date for a template
    that writes today's. ``longest``: characters of a conversation beyond which nothing is tokenized.

    Raises ConfigError for a tokenizer or a template by which answers cannot be found.
    """
    template = Template(tokenizer, day)
    if not tokenizer.is_fast:
        raise ConfigError(
            f"tokenizer {tokenizer.name_or_path!r} ({type(tokenizer).__name__}) does not tell where in the text its "
            "tokens are, which data.task=instruct needs; give one with a tokenizer.json."
        )
    if template.tagged:
        return [_by_tags(template, messages, where) for messages, where in batch]
    texts = [template.render(messages, where) for messages, where in batch]
    found = [answer_spans(template, *item, text) for item, text in zip(batch, texts, strict=True)]
    encoded = tokenizer(
        [text[:longest] for text in texts],
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=True,
        verbose=False,
        **_marks_are_tokens(tokenizer),
    )
    return [_marked(*one) for one in zip(encoded["input_ids"], encoded["offset_mapping"], found, strict=True)]


def _marks_are_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, bool]:
    """The template's marks are tokens even if the tokenizer is set to read such strings as text."""
    return {"split_special_tokens": False} if getattr(tokenizer, "split_special_tokens", False) else {}


def answer_ends(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of the tokens that end an assistant's turn, for a tokenizer whose chat template was trained with: the
    last token that is learned of an answer, if that is an added one and not a piece of text."""
    if not has_template(tokenizer) or not tokenizer.is_fast:
        return []
    question, answer = Turn(role="user", content="Hello"), Turn(role="assistant", content="word")
    for messages in ([question, answer], [Turn(role="system", content="Help."), question, answer]):
        try:
            (made,) = encode(tokenizer, [(messages, "a trial")])
        except ConfigError:  # a template may insist on a system turn, or refuse one
            continue
        last = made.ids[made.answer][-1:].tolist()
        known = {number for mark, number in tokenizer.get_added_vocab().items() if mark.strip()}
        if made.endless == 0 and set(last) <= known:
            return last
    return []


def _marked(ids: list[int], offsets: list[tuple[int, int]], found: list["Answer"]) -> Rendered:
    starts = np.array([start for start, _ in offsets], dtype=np.int64)
    answer = np.zeros(len(ids), dtype=bool)
    for one in found:
        answer |= (starts >= one.first) & (starts < one.last)
    return Rendered(np.array(ids, dtype=np.int64), answer, sum(not one.marked for one in found))


def _by_tags(template: Template, messages: Messages, where: str) -> Rendered:
    options = _marks_are_tokens(template.tokenizer)
    made = template.apply(
        messages,
        where,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"verbose": False, **options},
    )
    ids, answer = np.array(made["input_ids"], dtype=np.int64), np.array(made["assistant_masks"], dtype=bool)
    turns = [turn for turn in messages if turn["role"] == "assistant"]
    runs = [list(run) for counts, run in itertools.groupby(range(len(ids)), key=lambda i: answer[i]) if counts]
    if any(not turn.get("learn", True) for turn in turns):
        if len(runs) != len(turns):
            raise ConfigError(
                f"{where} has turns that are not to be learned (by weight or train), and the {{% generation %}} blocks "
                f"of the chat template mark {len(runs)} answers of {len(turns)} turns, so it is not clear which; leave "
                "the row out, or use a template without such blocks."
            )
        for turn, run in zip(turns, runs, strict=True):
            answer[run] = turn.get("learn", True)
    known = set(template.tokenizer.get_added_vocab().values())
    return Rendered(ids, answer, sum(int(ids[run[-1]]) not in known for run in runs if answer[run[-1]]))


@dataclass(frozen=True)
class Answer:
    """Characters ``first`` … ``last`` − 1 of a text; ``marked``: whether a mark ends them."""

    first: int
    last: int
    marked: bool


def answer_spans(template: Template, messages: Messages, where: str, text: str) -> list[Answer]:
    """Where in ``text``, the whole conversation rendered, the assistant's answers are that are to be learned.

    Each is what rendering adds with the turn to the conversation before it, up to the mark that ends the answer. A
    template that writes a turn in another way once others follow (Qwen3 drops earlier reasoning) has it found by its
    content and that mark.
    """
    spans: list[Answer] = []
    ending = template.known
    for number, message in enumerate(messages):
        if message["role"] != "assistant" or not message["content"].strip() or not message.get("learn", True):
            continue
        content = message["content"].strip()
        before = _before(template, messages, number, where, text)
        after = template.render(messages[: number + 1], where)
        if ending is None or not after.endswith(ending.tail):
            ending = template.ending(messages[:number], where)
        if text.startswith(after) and len(after) > len(before) and after.endswith(ending.tail):
            last = len(after) - len(ending.tail) + len(ending.own)
        else:
            place = text.find(content, len(before))
            if place < 0 or text[len(before) : place].strip():
                raise _lost(where, number)
            last = place + len(content)
            last += len(ending.own) if text.startswith(ending.own, last) else 0
        if ending.marked:  # what is blank after the mark is not said
            last = len(before) + len(text[len(before) : last].rstrip())
        spans.append(Answer(len(before), last, ending.marked))
    return spans


def _before(template: Template, messages: Messages, number: int, where: str, text: str) -> str:
    """The part of ``text`` up to where the assistant's turn ``number`` has to say something."""
    if number == 0:  # no template renders nothing
        opening = template.opening(where)
        return opening if text.startswith(opening) else text[: max(text.find(messages[0]["content"].strip()), 0)]
    prompt = template.render(messages[:number], where, prompt=True)
    if text.startswith(prompt):
        return prompt
    # The prompt for an answer may go on as this answer does not, with an opened <think> for instance.
    shared = next((i for i, (one, other) in enumerate(zip(prompt, text, strict=False)) if one != other), len(text))
    if shared < len(template.render(messages[:number], where)):
        raise _lost(where, number)
    return text[:shared]


def _lost(where: str, number: int) -> ConfigError:
    return ConfigError(
        f"{where}: the chat template writes turn {number + 1}, or what comes before it, in another way once later "
        "turns follow, so that its answer cannot be found; use a template with {% generation %} blocks, or rows with "
        "one answer each, and without a system turn if it moves or drops that."
    )
