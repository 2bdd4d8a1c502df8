"""Multiple choice by log-likelihood: which of the answers offered does a model find the likeliest?"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..data.sources import rows
from ..data.tokenizing import leading_ids
from ..errors import ConfigError

_LOGITS = 1 << 26  # values of logits at once: 256 MiB in fp32


@dataclass(frozen=True)
class Question:
    """``prompt``: what the model reads; ``choices``: what may follow it, without the space between;
    ``answer``: the index of the right one."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Scores:
    """``log_likelihoods[i][j]``: of question i's choice j, in nats, summed over its tokens. ``cut``: how many of the
    choices had the beginning of their prompt cut off to fit the model."""

    questions: tuple[Question, ...]
    log_likelihoods: tuple[tuple[float, ...], ...]
    cut: int

    def right(self, per_byte: bool = False) -> tuple[bool, ...]:
        """Of each question, whether its right choice has the highest log-likelihood (of equals the first is taken).
        ``per_byte``: divided by the choice's length in UTF-8 bytes, which no tokenizer changes."""
        found = []
        for question, values in zip(self.questions, self.log_likelihoods, strict=True):
            sizes = [len(choice.encode()) if per_byte else 1 for choice in question.choices]
            scaled = [value / size for value, size in zip(values, sizes, strict=True)]
            found.append(scaled.index(max(scaled)) == question.answer)
        return tuple(found)

    @property
    def accuracy(self) -> float:
        return sum(self.right()) / len(self.questions)

    @property
    def accuracy_per_byte(self) -> float:
        """The same by log-likelihood per byte."""
        return sum(self.right(per_byte=True)) / len(self.questions)

    @property
    def chance(self) -> float:
        return sum(1 / len(question.choices) for question in self.questions) / len(self.questions)

    def standard_error(self, accuracy: float) -> float:
        """Of an accuracy over these questions, as a binomial share."""
        return math.sqrt(accuracy * (1 - accuracy) / len(self.questions))


def read_questions(path: str | Path) -> list[Question]:
    """The questions of a .jsonl(.gz) file. Raises ConfigError, naming the line, for what is none.

    A row has ``question``, ``choices`` (texts) and ``answer`` (the index of the right one from 0, its letter from A, or
    its text), asked as "Question: …\\nAnswer:"; a ``passage`` goes before it. Or ``query``, which is read as it stands,
    ``choices`` and ``gold``.
    """
    found = [_question(row, where) for row, where in rows(str(path))]
    if not found:
        raise ConfigError(f"{path} has no questions; give a file with a question in each line.")
    return found


def _question(row: dict[str, Any], where: str) -> Question:
    layout = next(
        (keys for keys in (("query", "gold"), ("question", "answer")) if all(key in row for key in keys)), None
    )
    if layout is None or "choices" not in row:
        present = ", ".join(map(repr, row)) or "none"
        raise ConfigError(f"{where} has the keys {present}; it needs question, choices and answer (or query and gold).")
    text, choices = row[layout[0]], row["choices"]
    if not isinstance(text, str):
        raise ConfigError(f"{where}: {layout[0]!r} is of type {type(text).__name__}; it must be text.")
    usable = isinstance(choices, list) and all(isinstance(choice, str) and choice.strip() for choice in choices)
    if not usable or len(choices) < 2:
        raise ConfigError(f"{where}: 'choices' must be a list of two texts or more, none of them blank.")
    if layout[0] == "question":
        passage = f"{row['passage']}\n\n" if row.get("passage") else ""
        text = f"{passage}Question: {text}\nAnswer:"
    return Question(
        text, tuple(choice.strip() for choice in choices), _index(row[layout[1]], choices, layout[1], where)
    )


def _index(answer: Any, choices: list[str], key: str, where: str) -> int:
    index = answer
    if isinstance(answer, str):
        letters = [chr(ord("A") + place) for place in range(len(choices))]
        names = choices if answer in choices else letters
        index = names.index(answer) if answer in names else None
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(choices):
        raise ConfigError(
            f"{where}: {key!r} is {answer!r}; it must be an index from 0 to {len(choices) - 1}, a letter, or a choice."
        )
    return index


def with_examples(questions: Sequence[Question], shots: int) -> list[Question]:
    """All but the first ``shots`` questions, each behind those first ones with their right answers. Raises ConfigError
    if that leaves none."""
    if not 0 <= shots < len(questions):
        raise ConfigError(
            f"shots is {shots}; it must be from 0 to {len(questions) - 1}, which leaves a question to ask."
        )
    before = "".join(f"{one.prompt} {one.choices[one.answer]}\n\n" for one in questions[:shots])
    return [Question(before + one.prompt, one.choices, one.answer) for one in questions[shots:]]


def score(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    batch_size: int = 16,
) -> Scores:
    """The log-likelihood of every choice behind its prompt and a space, under ``model`` (causal, on any device).

    The tokens that count are those of prompt and choice together, from the first that the prompt alone does not have.
    What is longer than the model's positions loses its beginning. Texts of like length go together, padded at the end,
    which causal attention does not see. Raises ConfigError.
    """
    items, cut = _encoded(tokenizer, questions, getattr(model.config, "max_position_embeddings", None))
    order = sorted(range(len(items)), key=lambda place: -len(items[place][0]))
    values = [0.0] * len(items)
    was_training = model.training
    model.eval()
    vocabulary = model.get_output_embeddings().weight.shape[0]
    while order:
        rows_at_once = max(1, min(batch_size, _LOGITS // (vocabulary * len(items[order[0]][0]))))
        batch, order = order[:rows_at_once], order[rows_at_once:]
        for place, value in zip(batch, _log_likelihoods(model, [items[i] for i in batch]), strict=True):
            values[place] = value
    model.train(was_training)
    if not all(map(math.isfinite, values)):
        raise ConfigError("the model gives some choices a likelihood that is not finite; its weights are damaged")
    rest = iter(values)
    return Scores(tuple(questions), tuple(tuple(next(rest) for _ in one.choices) for one in questions), cut)


def _encoded(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], longest: int | None
) -> tuple[list[tuple[list[int], int]], int]:
    """(ids, how many of the last of them count) of every choice, and how many had to be cut."""
    front = leading_ids(tokenizer)
    items, cut = [], 0
    for question in questions:
        prompt = [*front, *tokenizer(question.prompt, add_special_tokens=False)["input_ids"]]
        for choice in question.choices:
            ids = [*front, *tokenizer(f"{question.prompt} {choice}", add_special_tokens=False)["input_ids"]]
            shared = next((i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), len(prompt))
            counting = len(ids) - max(min(shared, len(ids) - 1), 1)
            if longest is not None and len(ids) > longest:
                if counting >= longest:
                    raise ConfigError(
                        f"a choice has {counting} tokens, and the model has {longest} positions: {choice!r}"
                    )
                cut += 1
                ids = ids[-longest:]
            items.append((ids, counting))
    return items, cut


@torch.no_grad()
def _log_likelihoods(model: nn.Module, items: Sequence[tuple[list[int], int]]) -> list[float]:
    device = model.get_input_embeddings().weight.device
    longest = max(len(ids) for ids, _ in items)
    rows_of_ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in items], device=device)
    logits: Tensor = model(input_ids=rows_of_ids, use_cache=False).logits
    values = []
    for row, (ids, counting) in enumerate(items):
        end = len(ids)
        chosen = torch.log_softmax(logits[row, end - counting - 1 : end - 1].float(), dim=-1)
        targets = rows_of_ids[row, end - counting : end]
        values.append(float(chosen.gather(1, targets[:, None]).double().sum()))
    return values
