"""The sources of a run's data: how each is read and packed, what of it is held out, how much of it the run sees."""

from dataclasses import dataclass
from datetime import date
from functools import partial

from transformers import PreTrainedTokenizerBase

from ..config import Config, Source, steps_of
from ..data.instruct import conversations_to_disk
from ..data.mixing import Mixture, whole_numbers
from ..data.packing import PackedSequences
from ..data.paths import looks_like_path
from ..data.sources import ENDINGS
from ..data.tokens import TokenFile, tokenize_to_disk
from ..errors import ConfigError, counted
from .say import say

OFTEN = 4  # passes over a source beyond which new text would teach more (Muennighoff et al. 2023, arXiv 2305.16264)


@dataclass(frozen=True)
class Reader:
    """Reads and packs sources for a run. ``day``: the date for a chat template that writes one."""

    config: Config
    tokenizer: PreTrainedTokenizerBase
    day: date

    def read(self, source: Source, *, split: str = "train", max_tokens: int | None) -> TokenFile:
        """The tokens of a source, as its ``task`` lays them out."""
        data = self.config.data
        if source.task == "instruct":
            read = partial(conversations_to_disk, sequence_length=data.sequence_length, day=self.day)
        else:
            read = partial(tokenize_to_disk, text_key=source.text_key)
        return read(source.path, self.tokenizer, cache_dir=data.cache_dir, split=split, max_tokens=max_tokens)

    def pack(self, tokens: TokenFile, key: str) -> PackedSequences:
        """The samples of ``tokens``. A complaint says of which ``key`` it is."""
        data = self.config.data
        try:
            return PackedSequences(
                tokens,
                sequence_length=data.sequence_length,
                document_attention=data.document_attention,
                with_documents=self.config.model.attention == "auto",
            )
        except ConfigError as error:
            raise ConfigError(f"{key}: {error}") from error


def samples_of(config: Config, samples: int) -> int:
    """How many samples the run draws, of so many that there are."""
    train = config.train
    return steps_of(train, samples) * train.micro_batch_size * train.grad_accumulation


def epochs_of(config: Config, samples: int) -> float:
    """How often a run sees each of so many training ``samples``."""
    return samples_of(config, samples) / samples


def needed_tokens(config: Config, key: str) -> int | None:
    """How many tokens the run reads of the source under ``key``: of a hub dataset those that it trains on, and None for
    local files, which are read whole. Raises ConfigError where that many are not known."""
    train, source = config.train, config.data.sources[key]
    if looks_like_path(source.path, ENDINGS):
        return None
    if train.epochs is not None:
        raise ConfigError(
            f"train.epochs is {train.epochs:g}, and {key} {source.path!r} is a hub dataset, of which only as much is "
            "read as the run needs; say how much an epoch is with data.max_tokens, or give train.max_steps instead"
        )
    weights = dict(zip(config.data.sources, weights_of(config), strict=True))
    drawn = -(-samples_of(config, 1) * weights[key] // sum(weights.values()))  # see mixing.turns
    return drawn * config.data.sequence_length + 1


def weights_of(config: Config) -> list[int]:
    """The weights of the sources as whole numbers."""
    return whole_numbers([source.weight for source in config.data.sources.values()])


def cut_tail(config: Config, key: str, tokens: TokenFile) -> tuple[TokenFile, TokenFile]:
    """The training text of a source without its end, and that end. Raises ConfigError if either has no whole sample."""
    data = config.data
    whole, needed = len(tokens.tokens), data.sequence_length + (tokens.row_length is None)
    enough = "give more data, a shorter data.sequence_length, or a second file as data.valid"
    if whole < 2 * needed:
        raise ConfigError(
            f"{key} has {whole} tokens, and data.valid is not set, so a sample of {needed} is needed twice, to "
            f"train on and to hold out; {enough}"
        )
    train, held_out = tokens.split_tail(data.valid_fraction)
    if min(len(train.tokens), len(held_out.tokens)) < needed:
        tried = [number / 1000 for number in range(1, 500)]
        fits = [f for f in tried if min(len(part.tokens) for part in tokens.split_tail(f)) >= needed]
        remedy = f"set data.valid_fraction to {fits[0]:g}, or give a second file as data.valid" if fits else enough
        raise ConfigError(
            f"data.valid_fraction is {data.valid_fraction:g}, by which {len(held_out.tokens)} of the {whole} tokens of "
            f"{key} are held out and {len(train.tokens)} are left; a sample needs {needed} (data.sequence_length "
            f"is {data.sequence_length}); {remedy}"
        )
    say("held out", f"the last {data.valid_fraction:.1%} of {data.sources[key].path} (set data.valid to choose)")
    return train, held_out


def say_shares(config: Config, mixture: Mixture, tokens: list[TokenFile]) -> None:
    """A line about each source of several: its size, its share of the samples, and how often it is seen."""
    if len(tokens) == 1:
        return
    drawn, total = samples_of(config, len(mixture)), sum(mixture.weights)
    seen: dict[str, str] = {}  # names by the tokens
    for name, weight, samples, held in zip(mixture.names, mixture.weights, mixture.sources, tokens, strict=True):
        share = drawn * weight / total
        epochs = share / len(samples)
        say(
            "source",
            f"{name}: {counted(len(held.tokens), 'token')} in {counted(held.n_documents, 'document')}, "
            f"{counted(len(samples), 'sample')}; {weight / total:.1%} of what is drawn, {epochs:.2f} epochs",
        )
        if (same := seen.setdefault(held.checksum, name)) != name:
            say("note", f"{name} has the same tokens as {same}, so the shares of both go to them; leave one out")
        if share < 1:
            say(
                "note",
                f"{name} gives at most one of the {counted(drawn, 'sample')} that this run draws; raise its weight, or "
                "make the run longer",
            )
        if epochs > OFTEN:
            say(
                "note",
                f"{name} is seen {epochs:.1f} times, and more than {OFTEN} times teach little; give more of it, or "
                "lower its weight",
            )
