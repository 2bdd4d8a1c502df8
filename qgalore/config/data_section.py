"""The keys of what is trained on and held out."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, field_serializer, field_validator

from .schema import SIDE, Once, Section, key, once


class Source(Section):
    path: str = key(
        ..., "A file, a folder of files, or a Hugging Face dataset's id.", min_length=1, example="my_text.jsonl"
    )
    text_key: str | None = key(
        None, "The key of a row that holds its text.", min_length=1, example="story", unset="data.text_key"
    )
    task: Literal["text", "instruct"] | None = key(None, "What the source is.", example="text", unset="data.task")

    @property
    def shortest(self) -> Any:
        """How it may be given: as a path, if it says nothing else."""
        return self.path if self == type(self)(path=self.path) else self


One = TypeVar("One", bound=Source)


class TrainSource(Source):
    weight: float = key(1.0, "The source's share of all tokens, beside the weights of the others.", gt=0, le=1e9)


SetName = Annotated[str, Field(pattern=r"^[\w.+-]{0,100}$")]  # "" is that of a set alone


def _source(value: Any) -> Any:
    """A path stands for a source that says nothing else."""
    is_path = isinstance(value, str | int) and not isinstance(value, bool) and value != ""
    return {"path": value} if is_path else value


def _is_alone(value: Any) -> bool:
    return isinstance(value, dict) and "path" in value


class DataSection(Section):
    task: Literal["text", "instruct", "classify"] = key(
        "text", "What the data are: plain text, conversations whose answers are learned, or labelled texts to classify."
    )
    train: list[TrainSource] = key(
        ..., "A file, a folder of files, or a Hugging Face dataset's id. Or a list of such sources, from which samples "
        "are drawn by `weight`, which counts tokens. A source of a list may have a `text_key` and a `task` of its own, "
        "for example `{path: wiki.jsonl, weight: 2, text_key: body, task: text}`. Only `path` must be given.",
        min_length=1, max_length=1000, example="my_text.jsonl",
        rule="a file, a folder or an id, or a list of sources such as [{path: a.txt, weight: 2}, {path: b.jsonl}]",
    )  # fmt: skip
    valid: dict[SetName, Source] | None = key(
        None, "The held-out data, given in the same ways, or several sets by name, whose losses are told one by one. "
        "`eval_loss` is that of all their tokens together. A set may have a `text_key` and a `task` of its own, as in "
        "`{path: b.jsonl, text_key: body}`.", min_length=1, example="held_out.jsonl",
        unset="the last data.valid_fraction of data.train is held out",
        rule="a file, a folder or an id, or a mapping of names to them, such as {stories: a.txt, code: b.jsonl}, with "
        "names of at most 100 letters, digits and . + - _",
    )  # fmt: skip
    valid_fraction: float = key(0.01, "The share of data.train to hold out if there is no data.valid.", gt=0, lt=0.5)
    tokenizer: str | None = key(
        None, "The tokenizer's folder, its tokenizer.json, or a hub id.", min_length=1, example="models/Qwen2.5-7B",
        unset="that of model.path, or else a byte-level BPE is trained on data.train",
    )  # fmt: skip
    added_tokens: list[str] = key(
        [], "Special tokens to add to the tokenizer, such as the marks of turns. Rows of a pretrained model for them "
        "begin as the mean of its other rows.",
        rule="a list of tokens, each of them once, and none of them blank", example=["<|im_start|>", "<|im_end|>"],
    )  # fmt: skip
    vocab_size: int = key(
        8192, "The size of a tokenizer that is trained here.", unit="tokens", ge=257, le=SIDE,
        rule=f"a whole number from 257 (the 256 bytes and an end mark) to {SIDE:,}",
    )  # fmt: skip
    sequence_length: int = key(256, "The length of a row of the batch.", unit="tokens", ge=2, le=SIDE)
    valid_split: str = key(
        "validation",
        "The split to read if data.valid is a hub id. From data.train the split train is read.",
        min_length=1,
    )
    text_key: str = key("text", "The key of a row that holds its text.", min_length=1)
    document_attention: Literal["isolated", "joined"] = key(
        "isolated", "Whether documents packed into one row see each other (`joined`) or only themselves (`isolated`)."
    )
    max_tokens: int | None = key(
        None, "Reading of data.train, or of each source in it, stops after this many tokens.", unit="tokens", ge=1,
        le=2**50, example=100_000_000,
        unset="all of a file, or as much of a hub dataset as the run needs",
    )  # fmt: skip
    cache_dir: str = key("cache", "The folder for tokens and tokenizers, which later runs use again.", min_length=1)
    text_keys: list[str] = key(
        ["sentence"], "Columns with the text to classify, or with the pair of texts.", min_length=1, max_length=2,
        rule="a list of one column name, or of two for a pair of texts",
    )  # fmt: skip
    label_key: str = key("label", "The column with the label.", min_length=1)
    label_type: Literal["class", "number"] = key(
        "class", "Whether labels are classes, or numbers that are predicted by regression."
    )
    header: bool = key(
        True, 'Whether the first line of a .tsv or .csv names its columns. If not, they are called "0", "1" and so on.'
    )
    metric: Annotated[list[Literal["accuracy", "f1", "matthews", "pearson", "spearman"]], Once] = key(
        [], "Metrics of held-out labels. An empty list stands for all that suit the labels.", example=["f1"]
    )

    @field_validator("added_tokens")
    @classmethod
    def _tokens(cls, value: list[str]) -> list[str]:
        if any(not token.strip() for token in value):
            raise ValueError("a token is blank")
        return once(value)

    @field_validator("train", mode="before")
    @classmethod
    def _paths_alone(cls, value: Any) -> Any:
        """One source needs no list."""
        value = [_source(value)] if _is_alone(_source(value)) else value
        return list(map(_source, value)) if isinstance(value, list) else value

    @field_validator("valid", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        """A set alone needs no name."""
        value = {"": _source(value)} if _is_alone(_source(value)) else value
        return {name: _source(one) for name, one in value.items()} if isinstance(value, dict) else value

    @field_serializer("train", "valid")
    def _as_asked(self, value: Any) -> Any:
        """As short as it may be given: a path for a source alone, or a set, that says nothing else."""
        if isinstance(value, list):
            return value[0].shortest if len(value) == 1 else value
        found = {name: one.shortest for name, one in (value or {}).items()}
        return found.get("", found) or None

    @property
    def sources(self) -> dict[str, TrainSource]:
        """What is trained on, with everything filled in, by the key to name it with."""
        several = len(self.train) > 1
        return {f"data.train[{i}]" if several else "data.train": self._filled(one) for i, one in enumerate(self.train)}

    @property
    def held_out(self) -> dict[str, Source]:
        """The sources of ``valid`` by name, with everything filled in; empty if none is given."""
        return {name: self._filled(one) for name, one in (self.valid or {}).items()}

    @property
    def all_sources(self) -> dict[str, Source]:
        """Those that are trained on and those that are held out, by the key to name them with."""
        held_out = {f"data.valid.{name}".rstrip("."): one for name, one in self.held_out.items()}
        return {**self.sources, **held_out}

    def _filled(self, source: One) -> One:
        filled = {"text_key": source.text_key or self.text_key, "task": source.task or self.task}
        return source.model_copy(update=filled)
