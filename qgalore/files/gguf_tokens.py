"""A tokenizer as llama.cpp reads it: the kind of vocabulary, the pre-tokenizer's name, typed tokens, end marks.

llama.cpp knows pre-tokenizers by name and has their regular expressions built in. The name is chosen by comparing what
the tokenizer really does with what the name stands for; a tokenizer that does something else is refused.
"""

import json
import tempfile
from dataclasses import dataclass, field
from typing import Any, NoReturn, cast

from transformers import PreTrainedTokenizerBase

from ..errors import ConfigError, counted

REMEDY = "export with --format hf (export.formats: [hf]) and convert that with llama.cpp's own script"
_ENDINGS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORTENED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPELLED = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_WORD = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_CASES = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# What splits text, in order → llama.cpp's name, where whole words in the vocabulary skip the merges and where not.
PRE_TOKENIZERS: dict[tuple[str, ...], tuple[str | None, str | None]] = {
    (GPT2,): (None, "gpt-2"),
    (r"\p{N}", GPT2): (None, "smollm"),
    (_SHORTENED + _WORD + r"\p{N}{1,3}" + _ENDINGS,): ("llama-bpe", "smaug-bpe"),
    (_SHORTENED + _WORD + r"\p{N}" + _ENDINGS,): (None, "qwen2"),
    (_CASES[0] + _SHORTENED + "?" + _CASES[1] + _SHORTENED + "?" + r"|\p{N}{1,3}" + _TAIL,): (None, "gpt-4o"),
    (_CASES[0] + _CASES[1] + r"|\p{N}" + _TAIL,): ("tekken", None),
}


@dataclass
class Tokens:
    """What the file says of the tokenizer: the vocabulary by id, texts, kinds (``gguf.TokenType``) and, for
    SentencePiece, scores; ``special`` ids by kind (bos, eos, eot, …); which of them are put around every text."""

    model: str
    pre: str | None
    texts: list[str]
    kinds: list[int]
    scores: list[float] | None
    special: dict[str, int]
    added: dict[str, bool]
    notes: list[str] = field(default_factory=list)


def _refuse(what: str) -> NoReturn:
    raise ConfigError(f"the GGUF export cannot write this tokenizer: {what}; {REMEDY}")


def describe(tokenizer: PreTrainedTokenizerBase, rows: int, ends: list[int]) -> Tokens:
    """The vocabulary for a model of ``rows`` embeddings whose answers end with one of the ids ``ends``. Raises
    :class:`ConfigError` for a tokenizer that llama.cpp has no name for."""
    if not getattr(tokenizer, "is_fast", False):
        _refuse(f"{type(tokenizer).__name__} has no tokenizer.json")
    description = json.loads(cast(Any, tokenizer.backend_tokenizer).to_str())
    model = description["model"]
    if model.get("type") != "BPE":
        _refuse(f"its model is {model.get('type')}, and llama.cpp reads BPE and SentencePiece's BPE")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            _refuse(f"its BPE has {key} {model[key]!r}")
    special, notes = _special(tokenizer, rows, ends), []
    added = _around(tokenizer, special)
    if model.get("byte_fallback"):
        added["space_prefix"] = _space_prefix(description, notes)
        scores = _scores(description)
        texts, kinds = _vocabulary(description, rows, notes, sentencepiece=True)
        by_id = [scores.get(text, -1000.0) for text in texts]
        return Tokens("llama", "default", texts, kinds, by_id, special, added, notes)
    pre = _pre_tokenizer(description, notes)
    texts, kinds = _vocabulary(description, rows, notes, sentencepiece=False)
    return Tokens("gpt2", pre, texts, kinds, None, special, added, notes)


def _special(tokenizer: PreTrainedTokenizerBase, rows: int, ends: list[int]) -> dict[str, int]:
    """Ids by what they are for. Besides the tokenizer's eos a file can name two more tokens that end an answer."""
    names = ("bos", "eos", "unk", "sep", "pad", "mask")
    found = {name: getattr(tokenizer, f"{name}_token_id", None) for name in names}
    others = [end for end in dict.fromkeys(ends) if end != found["eos"]]
    if found["eos"] is None and others:
        found["eos"] = others.pop(0)
    found |= dict(zip(("eot", "eom"), others, strict=False))
    if len(others) > 2:
        _refuse(f"{len(others) + 1} tokens end an answer, and a GGUF file can name three")
    return {name: index for name, index in found.items() if index is not None and index < rows}


def _around(tokenizer: PreTrainedTokenizerBase, special: dict[str, int]) -> dict[str, bool]:
    """Whether the tokenizer itself puts bos before and eos after every text."""
    plain, whole = (tokenizer("a", add_special_tokens=flag)["input_ids"] for flag in (False, True))
    place = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), None)
    before, after = (whole, []) if place is None else (whole[:place], whole[place + len(plain) :])
    for ids, name in ((before, "bos"), (after, "eos")):
        if ids and ids != [special.get(name)]:
            where = "before" if name == "bos" else "after"
            _refuse(f"it puts {tokenizer.convert_ids_to_tokens(ids)} {where} every text, and llama.cpp only {name}")
    return {"bos": bool(before), "eos": bool(after)}


def _pre_tokenizer(description: dict[str, Any], notes: list[str]) -> str:
    """llama.cpp's name of a byte-level BPE's pre-tokenizer."""
    normalizer = description.get("normalizer")
    if normalizer and normalizer["type"] == "NFC":
        notes.append("GGUF export: llama.cpp does not compose characters first, as this tokenizer does (NFC)")
    elif normalizer:
        _refuse(f"its normalizer is {normalizer['type']}, and llama.cpp changes no text")
    given = description.get("pre_tokenizer") or {}
    steps = given.get("pretokenizers", [given])
    splits: list[str] = []
    for number, step in enumerate(steps):
        last = number == len(steps) - 1
        if step.get("type") == "ByteLevel" and last and not step.get("add_prefix_space"):
            splits += [GPT2] if step.get("use_regex", True) else []
        elif step.get("type") == "Digits" and step.get("individual_digits"):
            splits.append(r"\p{N}")
        elif step.get("type") == "Split" and _splits_all(step):
            splits.append(step["pattern"].get("Regex", step["pattern"].get("String")))
        else:
            _refuse(f"its pre-tokenizer has the step {json.dumps(step)}, which llama.cpp has no name for")
    if not steps or steps[-1].get("type") != "ByteLevel":
        _refuse("its BPE is neither byte-level nor SentencePiece's with byte_fallback")
    key = tuple(split.replace(_SPELLED, _SHORTENED) for split in splits)
    whole_words = bool(description["model"].get("ignore_merges"))
    name = PRE_TOKENIZERS.get(key, (None, None))[0 if whole_words else 1]
    if name is None:
        _refuse(f"llama.cpp has no name for its pre-tokenizer {splits} with ignore_merges {whole_words}")
    return name


def _splits_all(step: dict[str, Any]) -> bool:
    """Whether a ``Split`` keeps everything, cut at its matches."""
    return (step.get("behavior"), bool(step.get("invert"))) in (("Isolated", False), ("Removed", True))


def _space_prefix(description: dict[str, Any], notes: list[str]) -> bool:
    """Whether SentencePiece's tokenizer puts a space before a text; it must only turn spaces into ▁ else."""
    normalizer = description.get("normalizer") or {"type": "Sequence", "normalizers": []}
    steps = normalizer.get("normalizers", [normalizer])
    prefix = False
    for step in steps:
        if step["type"] == "Prepend" and step.get("prepend") == "▁":
            prefix = True
        elif step["type"] != "Replace" or (step.get("pattern"), step.get("content")) != ({"String": " "}, "▁"):
            _refuse(f"its normalizer has the step {json.dumps(step, ensure_ascii=False)}")
    pre = description.get("pre_tokenizer")
    if pre is None or (pre["type"] == "Split" and pre["pattern"] == {"String": " "}):  # no space is left to split at
        return prefix
    inner = any("▁" in text[1:] for text in description["model"]["vocab"])
    if pre["type"] != "Metaspace" or pre.get("replacement") != "▁" or (pre.get("split", True) and inner):
        _refuse(f"its pre-tokenizer is {json.dumps(pre, ensure_ascii=False)}")
    if pre.get("prepend_scheme", "always") == "first":
        notes.append(
            "GGUF export: llama.cpp puts a space after special tokens inside a text too, transformers does not"
        )
    return prefix or pre.get("prepend_scheme", "always") != "never"


def _scores(description: dict[str, Any]) -> dict[str, float]:
    """What SentencePiece's tokenizer merges first, by piece: the earlier its merges stand, the better.

    llama.cpp merges whatever two pieces make a third one, so each such pair must be a merge of the tokenizer.
    """
    vocab = description["model"]["vocab"]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in description["model"]["merges"]]
    known, order = set(merges), dict.fromkeys(left + right for left, right in merges)
    added = {entry["content"] for entry in description["added_tokens"]}
    for text in vocab:
        if text in added or (len(text) == 6 and text.startswith("<0x")):
            continue
        for cut in range(1, len(text)):
            pair = (text[:cut], text[cut:])
            if pair[0] in vocab and pair[1] in vocab and pair not in known:
                _refuse(f"{pair[0]!r} and {pair[1]!r} make the piece {text!r} without a merge, unlike SentencePiece's")
    return {text: -float(rank) for rank, text in enumerate(order)}


def _vocabulary(
    description: dict[str, Any], rows: int, notes: list[str], *, sentencepiece: bool
) -> tuple[list[str], list[int]]:
    """Text and kind of every id below ``rows``; ids that the tokenizer does not have are unused."""
    import gguf

    kinds = gguf.TokenType
    by_id = {index: text for text, index in description["model"]["vocab"].items()}
    added = {entry["id"]: entry for entry in description["added_tokens"]}
    if beyond := [index for index in {*by_id, *added} if index >= rows]:
        many = counted(len(beyond), "token has", "tokens have")
        notes.append(f"GGUF export: left out, {many} no row in the embedding of {rows}")
    unknown = description["model"].get("unk_token")
    texts, types = [], []
    for index in range(rows):
        entry = added.get(index)
        text = entry["content"] if entry else by_id.get(index)
        if text is None:
            text, kind = f"[PAD{index}]", kinds.UNUSED
        elif sentencepiece and text == unknown:
            kind = kinds.UNKNOWN
        elif entry:
            kind = kinds.CONTROL if entry["special"] else kinds.USER_DEFINED
            if entry.get("lstrip") or entry.get("rstrip"):
                notes.append(f"GGUF export: llama.cpp keeps the spaces beside {text}, transformers drops them")
            # Text, not pieces: the tokenizer looks for them before it does anything else.
            text = text if entry["special"] else text.replace("▁", " ")
        elif sentencepiece and len(text) == 6 and text.startswith("<0x"):
            kind = kinds.BYTE
        else:
            kind = kinds.NORMAL
        texts.append(text)
        types.append(int(kind))
    return texts, types


def write(writer, tokens: Tokens, tokenizer: PreTrainedTokenizerBase) -> None:
    """Add ``tokens`` to gguf's ``writer``, with the merges and the chat template as gguf reads them."""
    import gguf

    writer.add_tokenizer_model(tokens.model)
    writer.add_tokenizer_pre(tokens.pre)
    writer.add_token_list(tokens.texts)
    if tokens.scores is not None:
        writer.add_token_scores(tokens.scores)
    writer.add_token_types(tokens.kinds)
    with tempfile.TemporaryDirectory() as place:
        tokenizer.save_pretrained(place)
        vocabulary = gguf.SpecialVocab(place, load_merges=tokens.scores is None, special_token_types=())
    vocabulary.special_token_ids = dict(tokens.special)
    vocabulary.add_special_token = dict(tokens.added)
    space = vocabulary.add_special_token.pop("space_prefix", None)
    if space is not None:
        writer.add_add_space_prefix(space)
    vocabulary.add_to_gguf(writer, quiet=True)
