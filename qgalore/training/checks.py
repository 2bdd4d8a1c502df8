"""What can be known to be wrong before anything slow begins: before a tokenizer is trained or a token is written."""

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..config import Config, Source
from ..data.conversations import conversations
from ..data.labelled import examples_of
from ..data.notes import Notes
from ..data.paths import close_names, exists, looks_like_path
from ..data.sources import ENDINGS, ROW_ENDINGS, documents, local_files
from ..data.tokenizer import END_OF_TEXT, SMALLEST_VOCABULARY, train_tokenizer
from ..errors import ConfigError
from ..lowrank.inner.checked import make_factory
from ..models import classify, loading
from . import classification
from .attending import attend_as
from .export import check_formats
from .model import Vocabulary, adapt_as, architecture, convert_as
from .sources import needed_tokens


def check_data(config: Config) -> None:
    """Raise :class:`ConfigError`, naming the key, for paths and first rows that are not what ``data.task`` needs, and
    for a cache that cannot be made; hub datasets are opened."""
    data = config.data
    for key in data.sources if data.max_tokens is None else ():
        needed_tokens(config, key)
    for key, source in data.sources.items():
        if "," in source.path and not exists(Path(source.path).expanduser()):
            raise ConfigError(
                f"{key}: {source.path!r} does not exist. Several sources are a list here, such as "
                f"data.train=[{', '.join(part.strip() for part in source.path.split(','))}]"
            )
    for key, source in data.all_sources.items():
        if data.task != "classify" and looks_like_path(source.path, ENDINGS):
            endings = ROW_ENDINGS if source.task == "instruct" else ENDINGS
            try:
                with_key(key, partial(local_files, source.path, endings, Notes()))
            except ConfigError as error:
                if "[" in key and source.task == "instruct" and source.path.lower().endswith(ENDINGS[:2]):
                    raise ConfigError(
                        f"{error} If it is text, all of which is learned, add task: text to it"
                    ) from error
                raise
    for key, source in data.all_sources.items():
        split = "train" if key in data.sources else data.valid_split
        with_key(key, lambda source=source, split=split: next(_first(config, source, split), None))
    if data.tokenizer is not None and looks_like_path(data.tokenizer, (".json",)):
        path = Path(data.tokenizer).expanduser()
        if not path.exists():
            raise ConfigError(f"data.tokenizer: {data.tokenizer!r} does not exist. {close_names(path)}".rstrip())
    _check_cache(data.cache_dir)


def with_key(key: str, action) -> Any:
    """``action()``; a complaint of it begins with ``key``."""
    try:
        return action()
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error


def _first(config: Config, source: Source, split: str) -> Iterator[Any]:
    """The examples of a source, of which only the first is looked at."""
    data = config.data
    if source.task == "instruct":
        return conversations(source.path, split=split)
    if data.task == "classify":
        return examples_of(source.path, text_keys=data.text_keys, label_key=data.label_key, header=data.header)
    return documents(source.path, text_key=source.text_key, split=split)


def _check_cache(cache_dir: str) -> None:
    """The nearest folder that exists must let the cache be made in it. Nothing is made yet."""
    folder = Path(cache_dir).expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise ConfigError(f"data.cache_dir: {folder} is a file; name a folder, or a path where one can be made")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"data.cache_dir: nothing can be written into {folder}; name another folder")


def check_model(config: Config, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Raise :class:`ConfigError` for a preset, an architecture, a stored folder, an optimizer or a format of export
    that the run would fail with later. Everything is on the meta device; ``config`` is resolved. tokenizer: None if it
    is yet to be trained. Of a classifier exports and stored head are left to the build."""
    train = config.train
    make_factory(train.optimizer, train.lr, train.optimizer_options)
    to_be_trained = tokenizer is None
    if to_be_trained and config.data.vocab_size < SMALLEST_VOCABULARY:
        raise ConfigError(
            f"data.vocab_size: {config.data.vocab_size} is too small; a byte-level tokenizer has the 256 bytes and "
            f"{END_OF_TEXT}, so give at least {SMALLEST_VOCABULARY}"
        )
    vocabulary = Vocabulary(config.data.vocab_size + len(config.data.added_tokens), 0, 0)
    if tokenizer is not None:
        vocabulary = Vocabulary.of(tokenizer, config.data.added_tokens)
    if config.data.task == "classify":
        vocabulary = replace(vocabulary, labels=classification.PLANNED)
    model = _trial(config, vocabulary, to_be_trained)
    if model is None:
        return
    if config.model.path is not None and config.data.task == "classify":
        classify.check_folder(loading.local_folder(config.model.path))
    convert_as(config, model)
    attend_as(config, model)
    adapt_as(config, model)
    if config.data.task != "classify" and set(config.export.formats) - {"hf"}:
        stand_in = tokenizer or train_tokenizer(["a text that stands in"], vocab_size=SMALLEST_VOCABULARY)
        check_formats(model, stand_in, config.export.formats)


def _trial(config: Config, vocabulary: Vocabulary, to_be_trained: bool) -> nn.Module | None:
    """The model on the meta device. A tokenizer that is trained may get fewer entries than asked for, so a vocabulary
    that is too small for those is no mistake yet: None then."""
    if not to_be_trained:
        return architecture(config, vocabulary, lambda line: None)
    try:
        return architecture(config, vocabulary, lambda line: None)
    except ConfigError:
        # With the fewest entries that it can have, the complaint is about something else, or there is none.
        architecture(config, replace(vocabulary, size=SMALLEST_VOCABULARY), lambda line: None)
        return None
