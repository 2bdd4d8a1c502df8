"""The tokenizer and the data of a run."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..config import Config
from ..data.chat import PLAIN_TEMPLATE, has_template
from ..data.conversations import conversations
from ..data.instruct import conversations_to_disk
from ..data.labelled import LabelledTexts
from ..data.packing import PackedSequences
from ..data.paths import looks_like_path
from ..data.sources import ENDINGS, documents, fingerprint
from ..data.tokenizer import load_tokenizer, train_tokenizer
from ..data.tokens import TokenFile, tokenize_to_disk
from ..errors import ConfigError
from ..models import loading
from .say import say

HUB_VALIDATION_TOKENS = 10_000_000  # as the papers evaluate on C4


def build_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """The tokenizer named in the configuration, or a byte-level BPE trained on the corpus and cached; for conversations
    with a chat template, the plain one if it has none."""
    tokenizer = _find_tokenizer(config)
    if config.data.task == "instruct" and not has_template(tokenizer):
        tokenizer.chat_template = PLAIN_TEMPLATE
        say("note", "the tokenizer has no chat template; it gets a plain one: ### User: … ### Assistant: … end of text")
    return tokenizer


def _texts(config: Config) -> Iterator[str]:
    """The text of the training data, for a tokenizer."""
    data = config.data
    if data.task == "instruct":
        return (message["content"] for messages, _ in conversations(data.train) for message in messages)
    return documents(data.train, text_key=data.text_key)


def _find_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    data = config.data
    if data.tokenizer is not None:
        return load_tokenizer(data.tokenizer)
    if config.model.path is not None:
        loading.check_folder(config.model.path)
        say("tokenizer", f"the model's own, {config.model.path}")
        return load_tokenizer(config.model.path)
    if not looks_like_path(data.train, ENDINGS):
        raise ConfigError(
            f"data.train {data.train!r} is a hub dataset and data.tokenizer is not set; training one would read all of "
            "it. Name a tokenizer (data.tokenizer)"
        )
    key = data.text_key if data.task == "text" else f"({data.task})"
    digest = hashlib.sha256(f"{fingerprint(data.train)}|{key}|{data.vocab_size}".encode()).hexdigest()[:16]
    folder = Path(data.cache_dir) / f"tokenizer-{digest}"
    if (folder / "tokenizer.json").is_file() and (folder / "tokenizer_config.json").is_file():
        say("tokenizer", f"cached, {folder}")
        return load_tokenizer(str(folder))
    say("tokenizer", f"training byte-level BPE with {data.vocab_size} entries on {data.train}")
    tokenizer = train_tokenizer(_texts(config), vocab_size=data.vocab_size)
    building = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        tokenizer.save_pretrained(building)
        if not folder.exists():
            building.rename(folder)
    except OSError as error:
        raise ConfigError(f"the tokenizer cannot be cached in {folder}: {error}; set data.cache_dir") from error
    return tokenizer


@dataclass(frozen=True)
class Data:
    """Training and held-out samples, the highest token id among them, and what a resumed run knows its data by."""

    train: PackedSequences | LabelledTexts
    valid: PackedSequences | LabelledTexts
    highest_id: int
    description: str


def build_data(config: Config, tokenizer: PreTrainedTokenizerBase) -> Data:
    """Text or conversations, tokenized and packed."""
    data, train = config.data, config.train
    read = partial(tokenize_to_disk, text_key=data.text_key)
    if data.task == "instruct":
        read = partial(conversations_to_disk, sequence_length=data.sequence_length)
    read = partial(read, tokenizer=tokenizer, cache_dir=data.cache_dir)
    needed = train.max_steps * train.micro_batch_size * train.grad_accumulation * data.sequence_length + 1
    limit = data.max_tokens or (None if Path(data.train).exists() else needed)
    tokens = read(data.train, max_tokens=limit)
    if data.valid is not None:
        limit = None if Path(data.valid).exists() else HUB_VALIDATION_TOKENS
        held_out = read(data.valid, split=data.valid_split, max_tokens=limit)
    else:
        tokens, held_out = tokens.split_tail(data.valid_fraction)
        say("held out", f"the last {data.valid_fraction:.1%} of {data.train} (set data.valid to choose)")
    pack = partial(PackedSequences, sequence_length=data.sequence_length, document_attention=data.document_attention)
    packed, valid = (_labelled(pack, part, key) for part, key in ((tokens, "train"), (held_out, "valid")))
    epochs = train.max_steps * train.micro_batch_size * train.grad_accumulation / len(packed)
    say(
        "data",
        f"{len(tokens.tokens):,} tokens in {tokens.n_documents:,} documents, {len(packed):,} samples of "
        f"{data.sequence_length} ({epochs:.2f} epochs); held out: {len(valid):,} samples",
    )
    return Data(packed, valid, tokens.vocab_high, f"{len(packed)} samples of {tokens.digest()}")


def _labelled(pack, tokens: TokenFile, key: str) -> PackedSequences:
    """``pack(tokens)``, saying of which data a complaint is."""
    try:
        return pack(tokens)
    except ConfigError as error:
        raise ConfigError(f"data.{key}: {error}") from error
