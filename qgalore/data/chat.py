"""Conversations as tokens, with a mark on every token that an assistant would have to say."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from qgalore.data.conversations import Messages
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
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Rendered:
    """One conversation: ``ids`` (n,) int64, and ``answer`` (n,) bool, whether a token is the assistant's to say."""

    ids: np.ndarray
    answer: np.ndarray


def has_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether ``tokenizer`` has a chat template."""
    return bool(tokenizer.chat_template)


def encode(tokenizer: PreTrainedTokenizerBase, batch: Sequence[tuple[Messages, str]]) -> list[Rendered]:
    """The conversations of ``batch`` (each with its place, for errors) rendered with the tokenizer's chat template.

    The text is tokenized whole, as it is. A token is part of an answer if it begins in one; an answer is what the
    template writes for an assistant's turn after the prompt for it, with the mark that ends the turn and without white
    space after that mark. Answers that are blank do not count.
    Where the template has ``{% generation %}`` blocks, these say what an answer is.

    Raises ConfigError for a tokenizer without a template or without character offsets, for a conversation that the
    template refuses, and where the template writes a turn so that the answer cannot be found in the whole.
    """
    if not has_template(tokenizer):
        raise ConfigError(f"tokenizer {tokenizer.name_or_path!r} has no chat template; set its chat_template.")
    if not tokenizer.is_fast:
        raise ConfigError(
            f"tokenizer {tokenizer.name_or_path!r} ({type(tokenizer).__name__}) does not tell where in the text its "
            "tokens are, which data.task=instruct needs; give one with a tokenizer.json."
        )
    if isinstance(tokenizer.chat_template, str) and _GENERATION.search(tokenizer.chat_template):
        return [_by_tags(tokenizer, messages, where) for messages, where in batch]
    texts = [_render(tokenizer, messages, where) for messages, where in batch]
    spans = [answer_spans(tokenizer, *item, text) for item, text in zip(batch, texts, strict=True)]
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    return [_marked(*one) for one in zip(encoded["input_ids"], encoded["offset_mapping"], spans, strict=True)]


def _marked(ids: list[int], offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> Rendered:
    starts = np.array([start for start, _ in offsets], dtype=np.int64)
    answer = np.zeros(len(ids), dtype=bool)
    for first, last in spans:
        answer |= (starts >= first) & (starts < last)
    return Rendered(np.array(ids, dtype=np.int64), answer)


def _by_tags(tokenizer: PreTrainedTokenizerBase, messages: Messages, where: str) -> Rendered:
    made = _apply(
        tokenizer, messages, where, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, verbose=False
    )
    return Rendered(np.array(made["input_ids"], dtype=np.int64), np.array(made["assistant_masks"], dtype=bool))


def _apply(tokenizer: PreTrainedTokenizerBase, messages: Messages, where: str, **options):
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except (TemplateError, TypeError, KeyError, IndexError, ValueError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ConfigError(
            f"{where}: the tokenizer's chat template refuses this conversation ({roles}): {error}. Change the row, or "
            "give a tokenizer whose template takes it."
        ) from error


def _render(tokenizer: PreTrainedTokenizerBase, messages: Messages, where: str, *, prompt: bool = False) -> str:
    return _apply(tokenizer, messages, where, tokenize=False, add_generation_prompt=prompt)


def answer_spans(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, where: str, text: str
) -> list[tuple[int, int]]:
    """Where in ``text``, the whole conversation rendered, the assistant's answers are: (first, last + 1) characters.

    Each is what rendering adds with the turn to the conversation before it. A template that writes a turn in another
    way once others follow (Qwen3 drops earlier reasoning) has it found by its content and the mark that ends the last.
    """
    spans: list[tuple[int, int]] = []
    tail = None
    for number, message in enumerate(messages):
        if message["role"] != "assistant" or not message["content"].strip():
            continue
        content = message["content"].strip()
        before = _before(tokenizer, messages, number, where, text)
        after = _render(tokenizer, messages[: number + 1], where)
        if text.startswith(after) and len(after) > len(before):
            last = len(after)
        else:
            if tail is None:
                tail = _last_tail(tokenizer, messages[: number + 1], content, where)
            place = text.find(content, len(before))
            if place < 0 or text[len(before) : place].strip():
                raise _lost(where, number)
            last = place + len(content)
            last += len(tail) if text.startswith(tail, last) else 0
        ended = text[len(before) : last].rstrip()
        if not ended.endswith(content):  # something marks the end of the turn: what is blank after it is not said
            last = len(before) + len(ended)
        spans.append((len(before), last))
    return spans


def _before(tokenizer: PreTrainedTokenizerBase, messages: Messages, number: int, where: str, text: str) -> str:
    """The part of ``text`` up to where the assistant's turn ``number`` has to say something."""
    if number == 0:  # no template renders nothing
        return text[: max(text.find(messages[0]["content"].strip()), 0)]
    prompt = _render(tokenizer, messages[:number], where, prompt=True)
    if text.startswith(prompt):
        return prompt
    # The prompt for an answer may go on as this answer does not, with an opened <think> for instance.
    shared = next((i for i, (one, other) in enumerate(zip(prompt, text, strict=False)) if one != other), len(text))
    if shared < len(_render(tokenizer, messages[:number], where)):
        raise _lost(where, number)
    return text[:shared]


def _last_tail(tokenizer: PreTrainedTokenizerBase, messages: Messages, content: str, where: str) -> str:
    """What the template writes after ``content``, the last turn's; no further than the first token of its own, if it
    begins with one: what follows may end the whole text (Phi 3.5), not the turn."""
    text = _render(tokenizer, messages, where)
    place = text.rfind(content)
    tail = text[place + len(content) :] if place >= 0 else ""
    blank = len(tail) - len(tail.lstrip())
    marks = [mark for mark in tokenizer.get_added_vocab() if tail.startswith(mark, blank)]
    return tail[: blank + max(map(len, marks))] if marks else tail


def answer_ends(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the tokens that end an answer as the chat template writes it; empty if it marks no end."""
    content = "answer"
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": content}]
    tail = _last_tail(tokenizer, turns, content, "the end of an answer").strip()
    ids = tokenizer.get_added_vocab()
    return [ids[tail]] if tail in ids else []


def _lost(where: str, number: int) -> ConfigError:
    return ConfigError(
        f"{where}: the chat template writes turn {number + 1}, or what comes before it, in another way once later "
        "turns follow, so that its answer cannot be found; use a template with {% generation %} blocks, or rows with "
        "one answer each, and without a system turn if it moves or drops that."
    )
