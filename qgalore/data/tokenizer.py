"""Loading a tokenizer by name or path, and training a small byte-level one."""

import importlib.util
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from qgalore.data.paths import close_names, looks_like_path
from qgalore.errors import ConfigError

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # every byte, and the end-of-text token
# End-of-document tokens by the names the usual model families give them, for a tokenizer.json that comes alone.
_KNOWN_ENDS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>")


def load_tokenizer(name_or_path: str, *, report: Callable[[str], None] = print) -> PreTrainedTokenizerBase:
    """The tokenizer in a local folder, in a single ``tokenizer.json``, or of a Hugging Face model id.

    A ``tokenizer.json`` alone does not say which token ends a document: the one that ``config.json`` names, or one with
    a usual name, is then taken, and a line printed. So it is with a ``vocab.json`` and ``merges.txt``, read as GPT-2's
    kind. Never runs code that comes with a tokenizer. Raises ConfigError.
    """
    if not looks_like_path(name_or_path, (".json",)):
        return _from_pretrained(name_or_path, "Without network give a local folder or tokenizer.json, or set HF_HOME.")
    path = Path(name_or_path).expanduser()
    if not path.exists():
        raise ConfigError(f"tokenizer {name_or_path!r} does not exist. {close_names(path)}".rstrip())
    if path.is_dir():
        return _from_folder(path, report)
    if path.name == "tokenizer.json" and (path.parent / "tokenizer_config.json").exists():
        return _from_pretrained(str(path.parent), "Check that tokenizer.json and tokenizer_config.json are complete.")
    return _with_end(_from_file(path), path, report)


def add_tokens(
    tokenizer: PreTrainedTokenizerBase, tokens: list[str], report: Callable[[str], None] = print
) -> PreTrainedTokenizerBase:
    """``tokenizer`` with ``tokens`` as special ones, which no text is split into; what is new is reported."""
    before = tokenizer.get_vocab()
    if not tokens:
        return tokenizer
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens], special_tokens=True)
    after = tokenizer.get_vocab()
    if lost := [token for token in tokens if token not in after]:
        raise ConfigError(f"data.added_tokens: the tokenizer does not take {lost[0]!r}. Write it otherwise")
    new = [f"{token} ({after[token]})" for token in tokens if token not in before]
    old = [f"{token} ({after[token]})" for token in tokens if token in before]
    if new:
        report(f"special tokens added: {', '.join(new)}")
    if old:
        report(f"entries already, and special tokens now: {', '.join(old)}")
    return tokenizer


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int, show_progress: bool = False, report: Callable[[str], None] = print
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with at most ``vocab_size`` tokens, the same for the same texts.
    ``<|endoftext|>`` (id 0) is bos, eos and pad. ``show_progress`` draws the library's own bars on standard error.
    Raises ConfigError for ``vocab_size`` below 257 and for texts without a single character."""
    if vocab_size < SMALLEST_VOCABULARY:
        raise ConfigError(
            f"vocab_size is {vocab_size}; a byte-level tokenizer needs at least {SMALLEST_VOCABULARY}: the 256 bytes "
            f"and {END_OF_TEXT}."
        )
    backend = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        # A pair seen once would make a token that is never trained.
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=show_progress,
    )
    characters = 0

    def counted() -> Iterable[str]:
        nonlocal characters
        for text in texts:
            characters += len(text)
            yield text

    backend.train_from_iterator(counted(), trainer)
    if characters == 0:
        raise ConfigError("there is no text to train a tokenizer on; give a data source with some text in it.")
    reached = backend.get_vocab_size()
    if reached < vocab_size:
        report(f"tokenizer: the text ({characters} characters) yields {reached} tokens, not the {vocab_size} asked for")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def _byte_level(model: models.BPE) -> Tokenizer:
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend


def _from_folder(folder: Path, report: Callable[[str], None]) -> PreTrainedTokenizerBase:
    present = {path.name for path in folder.iterdir()}
    if "tokenizer.json" in present and "tokenizer_config.json" not in present:
        made = _from_pretrained(str(folder), "Give one written by the tokenizers library, with tokenizer_config.json.")
        return _with_end(made, folder, report)
    if {"vocab.json", "merges.txt"} <= present and not {"tokenizer.json", "tokenizer_config.json"} & present:
        return _with_end(_from_merges(folder), folder, report)
    pieces = sorted(name for name in present if name.endswith(".model"))
    if pieces and "tokenizer.json" not in present and importlib.util.find_spec("sentencepiece") is None:
        raise ConfigError(
            f"the tokenizer in {str(folder)!r} is a SentencePiece model alone ({pieces[0]}), and the package that "
            "reads it is not installed. Run: pip install sentencepiece protobuf"
        )
    return _from_pretrained(str(folder), "A tokenizer folder needs a tokenizer.json or its model's vocabulary files.")


def _from_pretrained(name: str, remedy: str) -> PreTrainedTokenizerBase:
    # The Hub, its clients and each tokenizer class raise many types, and all mean the same to the user.
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        lines = str(error).splitlines() or [""]
        said = f"{type(error).__name__}: {lines[0]}"
        if "trust_remote_code" in str(error):
            said, remedy = "it brings its own Python code, which qgalore never runs", "Give another as data.tokenizer."
        raise ConfigError(f"no tokenizer could be loaded from {name!r} ({said}). {remedy}") from error


def _from_file(path: Path) -> PreTrainedTokenizerFast:
    try:
        return PreTrainedTokenizerFast(tokenizer_file=str(path))
    except Exception as error:
        raise ConfigError(
            f"{str(path)!r} is not a tokenizer.json ({type(error).__name__}: {error}); give one written by the "
            "tokenizers library, or a tokenizer folder."
        ) from error


def _from_merges(folder: Path) -> PreTrainedTokenizerFast:
    """The byte-level BPE of GPT-2's kind in ``vocab.json`` and ``merges.txt``, without special tokens."""
    try:
        model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:
        raise ConfigError(
            f"the vocab.json and merges.txt in {str(folder)!r} are no byte-level BPE ({type(error).__name__}: {error})"
            "; give a folder with a tokenizer.json."
        ) from error
    backend = _byte_level(model)
    backend.add_special_tokens([name for name in _KNOWN_ENDS if backend.token_to_id(name) is not None])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def _with_end(tokenizer: PreTrainedTokenizerFast, path: Path, report: Callable[[str], None]) -> PreTrainedTokenizerFast:
    """``tokenizer`` with a token that ends documents: the one in the model's ``config.json``, or one with a usual name;
    which one is said."""
    if tokenizer.eos_token is not None:
        return tokenizer
    vocabulary = tokenizer.get_vocab()
    end, source = _stated_end(path if path.is_dir() else path.parent, tokenizer), "config.json's"
    if end is None:
        end, source = next((name for name in _KNOWN_ENDS if name in vocabulary), None), "a usual name"
    if end is not None:
        tokenizer.eos_token = end
        report(f"tokenizer: {str(path)!r} does not say which token ends a document; {end} is used ({source})")
    return tokenizer


def _stated_end(folder: Path, tokenizer: PreTrainedTokenizerFast) -> str | None:
    """The entry that ``config.json`` beside a tokenizer calls the end of a text; None if it names no entry."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}. Copy it again") from error
    token = fields.get("eos_token_id") if isinstance(fields, dict) else None
    token = token[0] if isinstance(token, list) and token else token
    known = isinstance(token, int) and not isinstance(token, bool) and 0 <= token < len(tokenizer)
    return tokenizer.convert_ids_to_tokens(token) if known else None
