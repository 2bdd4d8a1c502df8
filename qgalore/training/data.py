"""The tokenizer and the data of a run."""

import hashlib
import json
import shutil
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..config import Config
from ..data.chat import PLAIN_TEMPLATE, has_template
from ..data.checksums import file_digest, sync
from ..data.conversations import conversations
from ..data.instruct import conversations_to_disk
from ..data.labelled import LabelledTexts
from ..data.packing import PackedSequences
from ..data.paths import looks_like_path
from ..data.sources import ENDINGS, ROW_ENDINGS, documents, fingerprint
from ..data.templates import writes_date
from ..data.tokenizer import add_tokens, load_tokenizer, train_tokenizer
from ..data.tokenizing import Progress
from ..data.tokens import TokenFile, tokenize_to_disk
from ..errors import ConfigError, counted
from ..files import atomic
from ..models import loading
from .export import KEPT
from .say import say

HUB_VALIDATION_TOKENS = 10_000_000  # as the papers evaluate on C4
_CHARACTERS_A_TOKEN = 8  # a token is seldom longer
_SUMS = "checksums.json"


def build_tokenizer(config: Config, given: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    """The tokenizer ``given`` by the configuration, or a byte-level BPE trained on the corpus and cached; for
    conversations with a chat template, the plain one if it has none."""
    tokenizer = given or add_tokens(_own_tokenizer(config), config.data.added_tokens, partial(say, "tokenizer"))
    if config.data.task == "instruct" and not has_template(tokenizer):
        tokenizer.chat_template = PLAIN_TEMPLATE
        say("note", "the tokenizer has no chat template; it gets a plain one: ### User: … ### Assistant: … end of text")
    return tokenizer


def given_tokenizer(config: Config) -> PreTrainedTokenizerBase | None:
    """The tokenizer that the configuration names, or the model's own, with ``data.added_tokens``; None if one is to be
    trained.

    Raises ConfigError where it cannot be loaded, and for a hub dataset on which none can be trained.
    """
    data = config.data
    added = partial(add_tokens, tokens=data.added_tokens, report=partial(say, "tokenizer"))
    if data.tokenizer is not None:
        return added(load_tokenizer(data.tokenizer))
    if config.model.path is not None:
        # transformers reads config.json for a tokenizer too, and would call the tokenizer what is wrong with it.
        if loading.check_folder(config.model.path):
            loading.stored_config(loading.local_folder(config.model.path))
        say("tokenizer", f"the model's own, {config.model.path}")
        return added(load_tokenizer(config.model.path))
    kept = Path(config.run.dir) / config.run.name / KEPT
    if config.train.restart_schedule and kept.is_dir():
        say("tokenizer", f"that of the run before, copied to {kept}")
        return added(load_tokenizer(str(kept)))
    if not looks_like_path(data.train, ENDINGS):
        raise ConfigError(
            f"data.train {data.train!r} is a hub dataset and data.tokenizer is not set; training one would read all of "
            "it. Name a tokenizer (data.tokenizer)"
        )
    return None


def _texts(config: Config) -> Iterator[str]:
    """The text of the training data, for a tokenizer, about as much of it as ``data.max_tokens`` lets be read."""
    data = config.data
    texts: Iterator[str] = documents(data.train, text_key=data.text_key) if data.task == "text" else _said(data.train)
    left = None if data.max_tokens is None else data.max_tokens * _CHARACTERS_A_TOKEN
    read = 0
    line = partial(say, "tokenizer")
    with Progress("text", lambda: f"{read:,} characters read", lambda: read, line, "characters") as progress:
        for text in texts:
            part = text if left is None else text[: left - read]
            read += len(part)
            yield part
            progress.step()
            if read == left:
                break
    say("tokenizer", f"{read:,} characters read; choosing the entries")


def _said(source: str) -> Iterator[str]:
    return (turn["content"] for messages, _ in conversations(source) for turn in messages)


def _own_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """The tokenizer trained on the corpus, or what the cache has of it, if that is undamaged."""
    data = config.data
    key = data.text_key if data.task == "text" else f"({data.task})"
    endings = ENDINGS if data.task == "text" else ROW_ENDINGS
    what = [fingerprint(data.train, endings, report=partial(say, "data")), key, data.vocab_size, data.max_tokens]
    digest = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
    folder = Path(data.cache_dir).expanduser() / f"tokenizer-{digest}"
    try:
        if folder.exists():
            _check(folder)
            say("tokenizer", f"cached, {folder}")
            return load_tokenizer(str(folder))
    except (OSError, ValueError, RecursionError) as error:
        say("tokenizer", f"the cached one, {folder}, is damaged ({error}) and is trained again")
    say("tokenizer", f"training byte-level BPE with {data.vocab_size} entries on {data.train}")
    tokenizer = train_tokenizer(
        _texts(config), vocab_size=data.vocab_size, show_progress=sys.stderr is not None and sys.stderr.isatty()
    )
    try:
        with atomic.plain_errors():
            _keep(tokenizer, folder)
    except OSError as error:
        raise ConfigError(f"the tokenizer cannot be cached in {folder}: {error}; set data.cache_dir") from error
    return tokenizer


def _sums(folder: Path) -> dict[str, str]:
    names = sorted(path.name for path in folder.iterdir() if path.name != _SUMS)
    return {name: file_digest(folder / name, partial(say, "tokenizer")) for name in names}


def _check(folder: Path) -> None:
    """Raise OSError or ValueError if a cached tokenizer is not what was written."""
    if _sums(folder) != json.loads((folder / _SUMS).read_text(encoding="utf-8")):
        raise ValueError("its files have other bytes than were written")


def _keep(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Put a trained tokenizer into the cache, whole or not at all."""
    building = folder.with_name(f".building-{folder.name}-{uuid.uuid4().hex}")
    try:
        tokenizer.save_pretrained(building)
        (building / _SUMS).write_text(json.dumps(_sums(building), indent=1) + "\n", encoding="utf-8")
        for path in (*building.iterdir(), building):
            sync(path)
        if folder.exists():
            try:
                return _check(folder)  # another process was faster
            except (OSError, ValueError, RecursionError):
                folder.rename(building.with_name(f"{building.name}-damaged"))
                shutil.rmtree(building.with_name(f"{building.name}-damaged"), ignore_errors=True)
        building.rename(folder)
        sync(folder.parent)
        return None
    finally:
        shutil.rmtree(building, ignore_errors=True)


@dataclass(frozen=True)
class Data:
    """Training and held-out samples, the highest token id among them, and what a resumed run knows its data by:
    ``description`` by a look at some of them, ``checksum`` by every byte ("" for labelled examples)."""

    train: PackedSequences | LabelledTexts
    valid: PackedSequences | LabelledTexts
    highest_id: int
    description: str
    checksum: str = ""


def build_data(config: Config, tokenizer: PreTrainedTokenizerBase, day: date) -> Data:
    """Text or conversations, tokenized and packed. ``day``: the date for a chat template that writes one."""
    data, train = config.data, config.train
    read = partial(tokenize_to_disk, text_key=data.text_key)
    if data.task == "instruct":
        read = partial(conversations_to_disk, sequence_length=data.sequence_length, day=day)
        if writes_date(tokenizer):
            say("note", f"the chat template writes the date; in this run it is {day.isoformat()}, also when resumed")
    read = partial(read, tokenizer=tokenizer, cache_dir=data.cache_dir)
    needed = train.max_steps * train.micro_batch_size * train.grad_accumulation * data.sequence_length + 1
    limit = data.max_tokens or (None if looks_like_path(data.train, ENDINGS) else needed)
    tokens = read(data.train, max_tokens=limit)
    if data.valid is not None:
        limit = None if looks_like_path(data.valid, ENDINGS) else HUB_VALIDATION_TOKENS
        held_out = read(data.valid, split=data.valid_split, max_tokens=limit)
    else:
        tokens, held_out = _held_out(config, tokens)
    pack = partial(
        PackedSequences,
        sequence_length=data.sequence_length,
        document_attention=data.document_attention,
        with_documents=config.model.attention == "auto",
    )
    packed, valid = (_packed(pack, part, key) for part, key in ((tokens, "train"), (held_out, "valid")))
    epochs = train.max_steps * train.micro_batch_size * train.grad_accumulation / len(packed)
    say(
        "data",
        f"{counted(len(tokens.tokens), 'token')} in {counted(tokens.n_documents, 'document')}, "
        f"{counted(len(packed), 'sample')} of "
        f"{data.sequence_length} ({epochs:.2f} epochs); held out: {counted(len(valid), 'sample')}",
    )
    return Data(packed, valid, tokens.vocab_high, f"{len(packed)} samples of {tokens.digest()}", tokens.checksum)


def _held_out(config: Config, tokens: TokenFile) -> tuple[TokenFile, TokenFile]:
    """The training text without its end, and that end. Raises ConfigError if either is shorter than a sample."""
    data = config.data
    whole, needed = len(tokens.tokens), data.sequence_length + (tokens.row_length is None)
    enough = "give more data, a shorter data.sequence_length, or a second file as data.valid"
    if whole < 2 * needed:
        raise ConfigError(
            f"data.train has {whole} tokens, and data.valid is not set, so a sample of {needed} is needed twice, to "
            f"train on and to hold out; {enough}"
        )
    train, held_out = tokens.split_tail(data.valid_fraction)
    if min(len(train.tokens), len(held_out.tokens)) < needed:
        tried = [number / 1000 for number in range(1, 500)]
        fits = [f for f in tried if min(len(part.tokens) for part in tokens.split_tail(f)) >= needed]
        remedy = f"set data.valid_fraction to {fits[0]:g}, or give a second file as data.valid" if fits else enough
        raise ConfigError(
            f"data.valid_fraction is {data.valid_fraction:g}, by which {len(held_out.tokens)} of the {whole} tokens of "
            f"data.train are held out and {len(train.tokens)} are left; a sample needs {needed} (data.sequence_length "
            f"is {data.sequence_length}); {remedy}"
        )
    say("held out", f"the last {data.valid_fraction:.1%} of {data.train} (set data.valid to choose)")
    return train, held_out


def _packed(pack, tokens: TokenFile, key: str) -> PackedSequences:
    """``pack(tokens)``, saying of which data a complaint is."""
    try:
        return pack(tokens)
    except ConfigError as error:
        raise ConfigError(f"data.{key}: {error}") from error
