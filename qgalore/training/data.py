"""The tokenizer and the data of a run."""

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..config import Config, Source
from ..data.chat import PLAIN_TEMPLATE, has_template
from ..data.checksums import file_digest
from ..data.conversations import conversations
from ..data.labelled import LabelledTexts
from ..data.mixing import Mixture, names_of
from ..data.packing import PackedSequences
from ..data.paths import looks_like_path
from ..data.sources import ENDINGS, ROW_ENDINGS, documents, fingerprint
from ..data.templates import writes_date
from ..data.tokenizer import add_tokens, load_tokenizer, train_tokenizer
from ..data.tokenizing import Progress
from ..data.tokens import TokenFile
from ..errors import ConfigError, counted
from ..files import atomic
from ..models import loading
from .say import say
from .sources import Reader, cut_tail, epochs_of, needed_tokens, say_shares, weights_of

HUB_VALIDATION_TOKENS = 10_000_000  # as the papers evaluate on C4
_CHARACTERS_A_TOKEN = 8  # a token is seldom longer
_SUMS = "checksums.json"


def build_tokenizer(config: Config, given: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    """The tokenizer ``given`` by the configuration, or a byte-level BPE trained on the corpus and cached; for
    conversations with a chat template, the plain one if it has none."""
    tokenizer = given
    if tokenizer is None:
        tokenizer = add_tokens(_own_tokenizer(config), config.data.added_tokens, partial(say, "tokenizer"))
    if config.data.task == "instruct" and not has_template(tokenizer):
        tokenizer.chat_template = PLAIN_TEMPLATE
        say("note", "the tokenizer has no chat template; it gets a plain one: ### User: … ### Assistant: … end of text")
    return tokenizer


def given_tokenizer(config: Config, kept: Path | None = None) -> PreTrainedTokenizerBase | None:
    """The tokenizer that the configuration names, or the model's own, or the one ``kept`` by the run before, with
    ``data.added_tokens``; None if one is to be trained. Raises ConfigError, also for a hub dataset to train one on."""
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
    if kept is not None:
        say("tokenizer", f"that of the run before, {kept}")
        return added(load_tokenizer(str(kept)))
    for key, source in data.sources.items():
        if not looks_like_path(source.path, ENDINGS):
            raise ConfigError(
                f"{key} {source.path!r} is a hub dataset and data.tokenizer is not set; training one would read all of "
                "it. Name a tokenizer (data.tokenizer)"
            )
    return None


def _texts(config: Config) -> Iterator[str]:
    """The training data's text for a tokenizer, about as much of each source as ``data.max_tokens`` lets be read."""
    limit = None if config.data.max_tokens is None else config.data.max_tokens * _CHARACTERS_A_TOKEN
    read = 0
    line = partial(say, "tokenizer")
    with Progress("text", lambda: f"{read:,} characters read", lambda: read, line, "characters") as progress:
        for source in config.data.sources.values():
            left = limit
            for text in _said(source):
                part = text if left is None else text[:left]
                read += len(part)
                yield part
                progress.step()
                if left is not None and not (left := left - len(part)):
                    break
    say("tokenizer", f"{read:,} characters read; choosing the entries")


def _said(source: Source) -> Iterator[str]:
    """What a source says, conversations turn by turn."""
    if source.task == "instruct":
        return (turn["content"] for messages, _ in conversations(source.path) for turn in messages)
    return documents(source.path, text_key=source.text_key)


def _of_source(source: Source) -> tuple[str | None, str | None]:
    """What a trained tokenizer depends on in a source: its bytes, and how they are read."""
    endings = ENDINGS if source.task == "text" else ROW_ENDINGS
    key = source.text_key if source.task == "text" else f"({source.task})"
    return fingerprint(source.path, endings, report=partial(say, "data")), key


def _own_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """The tokenizer trained on the corpus, or what the cache has of it, if that is undamaged."""
    data = config.data
    what = [part for source in data.sources.values() for part in _of_source(source)]
    what += [data.vocab_size, data.max_tokens]
    digest = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
    folder = Path(data.cache_dir).expanduser() / f"tokenizer-{digest}"
    try:
        if folder.exists():
            _check(folder)
            say("tokenizer", f"cached, {folder}")
            return load_tokenizer(str(folder))
    except (OSError, ValueError, RecursionError) as error:
        say("tokenizer", f"the cached one, {folder}, is damaged ({error}) and is trained again")
    paths = ", ".join(source.path for source in data.sources.values())
    say("tokenizer", f"training byte-level BPE with {data.vocab_size} entries on {paths}")
    tokenizer = train_tokenizer(
        _texts(config), vocab_size=data.vocab_size, show_progress=sys.stderr is not None and sys.stderr.isatty()
    )
    try:
        with atomic.replacing_folder(folder, _is_whole) as building:  # others may read what another process has made
            tokenizer.save_pretrained(building)
            (building / _SUMS).write_text(json.dumps(_sums(building), indent=1) + "\n", encoding="utf-8")
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


def _is_whole(folder: Path) -> bool:
    try:
        _check(folder)
    except (OSError, ValueError, RecursionError):
        return False
    return True


@dataclass(frozen=True)
class Data:
    """Training samples and held-out ones by the name of their set ("" for a single one), the highest token id among the
    former, and what a resumed run knows its data by: ``description`` by a look at some of them, ``checksum`` by every
    byte ("" for labelled examples)."""

    train: Mixture
    valid: Mapping[str, PackedSequences | LabelledTexts]
    highest_id: int
    description: str
    checksum: str = ""


def build_data(config: Config, tokenizer: PreTrainedTokenizerBase, day: date) -> Data:
    """Text or conversations, tokenized and packed. ``day``: the date for a chat template that writes one."""
    data, reader = config.data, Reader(config, tokenizer, day)
    if data.task == "instruct" and writes_date(tokenizer):
        say("note", f"the chat template writes the date; in this run it is {day.isoformat()}, also when resumed")
    names = names_of([source.path for source in data.sources.values()])
    tokens, held_out = [], {}
    for name, (key, source) in zip(names, data.sources.items(), strict=True):
        found = reader.read(source, max_tokens=data.max_tokens or needed_tokens(config, key))
        if data.valid is None:
            found, held_out[name] = cut_tail(config, key, found)
        tokens.append(found)
    for name, source in data.held_out.items():
        limit = None if looks_like_path(source.path, ENDINGS) else HUB_VALIDATION_TOKENS
        held_out[name] = reader.read(source, split=data.valid_split, max_tokens=limit)
        if held_out[name].checksum in [one.checksum for one in tokens]:
            say(
                "note",
                f"{source.path} is held out and trained on, so its loss says nothing of new text; name another file, "
                "or leave data.valid out",
            )
    packed = tuple(reader.pack(one, key) for one, key in zip(tokens, data.sources, strict=True))
    valid = {name: reader.pack(part, f"data.valid.{name}".rstrip(".")) for name, part in held_out.items()}
    train = Mixture(tuple(names), tuple(weights_of(config)), packed)
    say_shares(config, train, tokens)
    say(
        "data",
        f"{counted(sum(len(one.tokens) for one in tokens), 'token')} in "
        f"{counted(sum(one.n_documents for one in tokens), 'document')}, {counted(len(train), 'sample')} of "
        f"{data.sequence_length} ({epochs_of(config, len(train)):.2f} epochs); held out: {_sizes(valid)}",
    )
    described = [f"{len(samples)} samples of {one.digest()}" for samples, one in zip(packed, tokens, strict=True)]
    return Data(train, valid, max(one.vocab_high for one in tokens), "; ".join(described), _checksum(tokens))


def _checksum(tokens: list[TokenFile]) -> str:
    """Of every byte of all token files; of one alone its own."""
    sums = [one.checksum for one in tokens]
    return sums[0] if len(sums) == 1 else hashlib.sha256(json.dumps(sums).encode()).hexdigest()


def _sizes(held_out: Mapping[str, PackedSequences]) -> str:
    """How many samples are held out in all, and in each set that has a name."""
    parts = ", ".join(f"{len(samples):,} of {name}" for name, samples in held_out.items() if name)
    return counted(sum(map(len, held_out.values())), "sample") + (f" ({parts})" if parts else "")
