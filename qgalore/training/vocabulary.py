"""What a tokenizer asks of a model, and how many rows a pretrained one gets for it."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ..config import Config
from ..data.labelled import Labels
from ..errors import ConfigError, counted


@dataclass(frozen=True)
class Vocabulary:
    """The entries of a tokenizer, and the ids of its special tokens. ``bound`` is one more than its highest id, and
    ``own`` so without ``added``, the ids of ``data.added_tokens``; both are 0 where no tokenizer was looked at."""

    size: int
    bos: int | None
    eos: int | None
    labels: Labels | None = None  # of a classifier
    padding: int | None = None  # the token that fills its batches
    bound: int = 0
    own: int = 0
    added: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, added: Collection[str] = ()) -> "Vocabulary":
        known = tokenizer.get_vocab()
        ids = tuple((token, known[token]) for token in added)
        bound = max(known.values(), default=-1) + 1
        own = max((number for token, number in known.items() if token not in added), default=-1) + 1
        return cls(len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id, bound=bound, own=own, added=ids)


def may_grow(config: Config) -> bool:
    """Whether a pretrained model may get more rows than its files have."""
    return config.model.path is not None and bool(config.data.added_tokens or config.model.grow_vocabulary)


def rows_wanted(config: Config, vocabulary: Vocabulary, rows: int) -> int:
    """How many rows the vocabulary of a pretrained model gets that has ``rows`` in its files. Raises
    :class:`ConfigError` for another tokenizer than the model's, unless the model is asked to grow for it."""
    if not may_grow(config):
        return rows
    if vocabulary.own > rows and not config.model.grow_vocabulary:
        raise ConfigError(
            f"data.added_tokens: without these tokens the tokenizer has ids up to {vocabulary.own - 1} already, and "
            f"the model has {rows} rows. Set data.tokenizer to the tokenizer that the model was trained with, or "
            "model.grow_vocabulary=true if all of its entries shall have rows"
        )
    return max(rows, vocabulary.bound)


def check_added(vocabulary: Vocabulary, rows: int) -> None:
    """Raise :class:`ConfigError` for an added token without a row in a fresh model, whose ``rows`` are stated."""
    without = [f"{token} ({number})" for token, number in vocabulary.added if number >= rows]
    if without:
        raise ConfigError(
            f"data.added_tokens: {_some(without)} would have no row in a model of {rows} rows. Set "
            f"model.overrides.vocab_size to {vocabulary.bound} or more, or leave the tokens out"
        )


def say_rows(
    config: Config, vocabulary: Vocabulary, rows: int, names: list[str], report: Callable[[str], None]
) -> None:
    """Report which ids have new rows in the tensors ``names``, and which added tokens have rows that were there."""
    new = range(rows, vocabulary.bound)
    if there := [f"{token} ({number})" for token, number in vocabulary.added if number < rows]:
        report(f"{_some(there)} of data.added_tokens: the model has rows for them already, which stay as they are")
    if not new:
        if config.model.grow_vocabulary:
            report(f"model.grow_vocabulary: {rows} rows are enough for ids up to {vocabulary.bound - 1}; none is added")
        return
    tokens = [token for token, number in vocabulary.added if number in new]
    others = len(new) - len(tokens)
    whose = [*([_some(tokens)] if tokens else []), *([counted(others, "entry", "entries")] if others else [])]
    ids = f"id {new[0]}" if len(new) == 1 else f"ids {new[0]} to {new[-1]}"
    begin = "it begins" if len(new) == 1 else "they begin"
    report(
        f"{counted(len(new), 'new row')} ({ids}) for {' and '.join(whose)} in {' and '.join(names)}: {begin} as the "
        f"mean of the {rows} rows that there were"
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
