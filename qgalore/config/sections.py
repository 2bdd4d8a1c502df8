"""The keys of a configuration: types, ranges, defaults, units and meanings, and the rules between them."""

import re
import types
import typing
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationInfo, field_validator

from .mesh import Mesh

STEPS = 2**40  # more optimizer steps, tokens or saves than any run has
SIDE = 2**20  # more rows, columns, tokens of a sequence or ranks than any model has


def key(
    default: Any,
    meaning: str,
    *,
    unit: str | None = None,
    rule: str | None = None,
    example: Any = None,
    unset: str | None = None,
    **limits: Any,
) -> Any:
    """A key's default (``...``: none, it must be given) and what docs and messages say of it.

    ``unit``: of its value; ``rule``: what a value must be, where types and ``limits`` do not say it; ``example``: a
    value to show, where the default shows none; ``unset``: what None stands for.
    """
    extra = {"unit": unit, "rule": rule, "example": example, "unset": unset}
    return Field(default, description=meaning, json_schema_extra=extra, **limits)


def members(annotation: Any) -> tuple[Any, ...]:
    """The types that a value of ``annotation`` may have, without None: those of a union, or itself."""
    if typing.get_origin(annotation) is Annotated:
        return members(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(one for arg in typing.get_args(annotation) for one in members(arg) if arg is not type(None))
    return (annotation,)


def is_textual(annotation: Any) -> bool:
    """Whether every value of ``annotation`` is text, or a list or mapping of texts; sections in a list may stand for
    texts there."""

    def textual(one: Any) -> bool:
        if typing.get_origin(one) is list:
            return is_textual(typing.get_args(one)[0]) or section_in(one) is not None
        if typing.get_origin(one) is dict:
            return is_textual(typing.get_args(one)[1])
        if typing.get_origin(one) is Literal:
            return all(isinstance(word, str) for word in typing.get_args(one))
        return one is str

    return all(map(textual, members(annotation)))


def section_in(annotation: Any) -> "type[Section] | None":
    """The section of which a value of ``annotation`` may be a list, if there is one."""
    for one in members(annotation):
        item = typing.get_args(one)[0] if typing.get_origin(one) is list else None
        if isinstance(item, type) and issubclass(item, Section):
            return item
    return None


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _of_one_kind(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic would read ``rank: true`` as 1 and ``keep_best: 1`` as true, and refuse 2024 as a name."""
        assert info.field_name is not None  # as for every validator of fields
        annotation = cls.model_fields[info.field_name].annotation
        allowed = members(annotation)
        truth_values, number = bool in allowed, isinstance(value, int | float) and not isinstance(value, bool)
        if isinstance(value, bool) and not truth_values:
            raise ValueError("a truth value")
        counted = int in allowed and isinstance(value, int)
        if truth_values and not isinstance(value, bool) and ((number and not counted) or allowed == (bool,)):
            raise ValueError("no truth value")
        if isinstance(value, int) and number and is_textual(annotation):
            return str(value)
        return value


def once(values: list[str]) -> list[str]:
    """``values``, if none of them is there twice; raises ``ValueError``."""
    if len(set(values)) < len(values):
        raise ValueError("a value is named twice")
    return values


class RunSection(Section):
    name: str = key(
        "run", "The run's name, and that of its folder under run.dir.", pattern=r"^\w[\w.+-]*$", max_length=200,
        rule="a name of at most 200 letters, digits and . + - _ that begins with a letter, a digit or _",
    )  # fmt: skip
    dir: str = key("runs", "The folder that holds the folders of runs.", min_length=1)
    seed: int = key(0, "Seeds fresh weights, the order of the data and every random rounding.", ge=0, lt=2**63)
    deterministic: bool = key(
        False, "Whether a GPU may only use kernels that give the same bits every time, which are slower. The run is "
        "refused where one is missing. On a CPU, the same number of threads gives the same bits anyway.",
    )  # fmt: skip


class ModelSection(Section):
    config: str | None = key(
        None, "A preset's name, or a Hugging Face config.json or its folder. The model is trained from scratch.",
        min_length=1, example="llama_60m", unset="model.path is given instead",
    )  # fmt: skip
    path: str | None = key(
        None, "A Hugging Face folder or a hub id. Training continues from its weights.", min_length=1,
        example="models/Qwen2.5-7B", unset="model.config is given instead",
    )  # fmt: skip
    overrides: dict[str, Any] = key(
        {}, "Fields of the model's config.json to change. In a pretrained model, all may change that leave its tensors "
        "as they are, such as dropouts or the scaling of positions.",
        rule="a mapping of fields to values, such as {hidden_size: 512}", example={"hidden_size": 512},
    )  # fmt: skip
    grow_vocabulary: bool = key(
        False, "Whether a pretrained model gets more rows if the tokenizer has more entries than it has rows. New rows "
        "begin as the mean of the others. For data.added_tokens it does so anyway.",
    )  # fmt: skip
    dtype: Literal["auto", "float32", "bfloat16"] = key(
        "auto", "The number format of activations and of tensors that are not quantized. With `auto` it is bfloat16 on "
        "a GPU that computes in it, else float32.",
    )  # fmt: skip
    compute: Literal["bf16", "int8"] = key(
        "bf16",
        "How low-rank layers multiply. With `bf16` they do so in model.dtype, and with `int8` integers by integers.",
    )
    attention: Literal["auto", "flex", "sdpa", "eager"] = key(
        "auto", "How tokens attend. With `auto`, every document packed into a row gets a call of PyTorch's fused "
        "attention. Where the model does not allow that, a mask keeps documents apart, as `sdpa` and `eager` do, and a "
        "line says so. `flex` is flex attention, for a GPU.",
    )  # fmt: skip
    compile: Literal["none", "blocks"] = key(
        "none", "With `blocks`, torch.compile makes each transformer block faster."
    )


class Source(Section):
    path: str = key(
        ..., "A file, a folder of files, or a Hugging Face dataset's id.", min_length=1, example="my_text.jsonl"
    )
    weight: float = key(1.0, "The source's share of all tokens, beside the weights of the others.", gt=0, le=1e9)
    text_key: str | None = key(
        None, "The key of a row that holds its text.", min_length=1, example="story", unset="data.text_key"
    )
    task: Literal["text", "instruct"] | None = key(None, "What the source is.", example="text", unset="data.task")


SetName = Annotated[str, Field(pattern=r"^[\w.+-]{1,100}$")]


class DataSection(Section):
    task: Literal["text", "instruct", "classify"] = key(
        "text", "What the data are: plain text, conversations whose answers are learned, or labelled texts to classify."
    )
    train: str | Annotated[list[Source], Field(max_length=1000)] = key(
        ..., "A file, a folder of files, or a Hugging Face dataset's id. Or a list of such sources, from which samples "
        "are drawn by `weight`, which counts tokens. A source of a list may have a `text_key` and a `task` of its own, "
        "for example `{path: wiki.jsonl, weight: 2, text_key: body, task: text}`. Only `path` must be given.",
        min_length=1, example="my_text.jsonl",
        rule="a file, a folder or an id, or a list of sources such as [{path: a.txt, weight: 2}, {path: b.jsonl}]",
    )  # fmt: skip
    valid: str | dict[SetName, str] | None = key(
        None, "The held-out data, given in the same ways, or several sets by name, whose losses are told one by one. "
        "`eval_loss` is that of all their tokens together.", min_length=1, example="held_out.jsonl",
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
    metric: list[Literal["accuracy", "f1", "matthews", "pearson", "spearman"]] = key(
        [], "Metrics of held-out labels. An empty list stands for all that suit the labels.", example=["f1"]
    )

    @field_validator("added_tokens")
    @classmethod
    def _tokens(cls, value: list[str]) -> list[str]:
        if any(not token.strip() for token in value):
            raise ValueError("a token is blank")
        return once(value)

    @field_validator("metric")
    @classmethod
    def _each_once(cls, value: list[str]) -> list[str]:
        return once(value)

    @field_validator("train", mode="before")
    @classmethod
    def _paths_alone(cls, value: Any) -> Any:
        """A path in a list is a source of weight 1, and one source needs no list."""
        if isinstance(value, dict) and "path" in value:
            return [value]
        if not isinstance(value, list):
            return value
        return [{"path": one} if isinstance(one, str) else one for one in value]

    @property
    def sources(self) -> dict[str, Source]:
        """What is trained on, with everything filled in, by the key to name it with."""
        if isinstance(self.train, str):
            return {"data.train": self.of_path(self.train)}
        found = [self._filled(source) for source in self.train]
        return {"data.train": found[0]} if len(found) == 1 else {f"data.train[{i}]": one for i, one in enumerate(found)}

    def of_path(self, path: str) -> Source:
        """A source that says nothing of its own."""
        return self._filled(Source(path=path))

    def _filled(self, source: Source) -> Source:
        filled = {"text_key": source.text_key or self.text_key, "task": source.task or self.task}
        return source.model_copy(update=filled)

    @property
    def held_out(self) -> dict[str, str]:
        """The sources of ``valid`` by name, "" for one that has none; empty if none is given."""
        if self.valid is None:
            return {}
        return {"": self.valid} if isinstance(self.valid, str) else self.valid


class TrainSection(Section):
    max_steps: int | None = key(
        None, "The length of training.", unit="optimizer steps", ge=1, le=STEPS, example=1000,
        unset="train.epochs is given instead",
    )  # fmt: skip
    epochs: float | None = key(
        None, "The length of training, as often as all of data.train is seen. A part of a step becomes a whole one. "
        "Of a list of sources an epoch is as many samples as all of them have. "
        "A hub dataset needs data.max_tokens too.", unit="passes over data.train", gt=0, le=SIDE, example=3,
        unset="train.max_steps is given instead",
    )  # fmt: skip
    micro_batch_size: int = key(8, "Rows that go through the model at once.", unit="rows", ge=1, lt=SIDE)
    grad_accumulation: int = key(
        1, "Micro-batches of a step, those of all processes together.", unit="micro-batches", ge=1, lt=SIDE
    )
    lr: float = key(..., "The peak learning rate.", gt=0, le=100, example=0.001)
    weight_decay: float = key(
        0.0, "Decoupled weight decay. A step shrinks weights by lr · weight_decay.", ge=0, le=1000
    )
    warmup_steps: int = key(
        0, "The learning rate rises linearly for this long at the start.", unit="optimizer steps", ge=0, le=STEPS
    )
    warmup_ratio: float | None = key(
        None, "The length of the warm-up as a share of all steps, rounded up to whole ones.", ge=0, le=1, example=0.03,
        unset="train.warmup_steps says it",
    )  # fmt: skip
    lr_schedule: Literal["cosine", "linear", "constant"] = key("cosine", "How the learning rate falls after warm-up.")
    min_lr_ratio: float = key(0.1, "The learning rate of the last step, as a share of train.lr.", ge=0, le=1)
    restart_schedule: bool = key(
        False, "Whether a run that `--resume PATH` begins on another run's checkpoint takes its weights, moments and "
        "bases alone. Steps, data and the learning rate then begin anew, and their keys may be others.",
    )  # fmt: skip
    clip_grad_norm: float = key(
        0.0, "The largest global norm of the gradient. With 0 nothing is clipped.", ge=0, le=1e9
    )
    clip_update_rms: float = key(
        0.0, "The largest root mean square of a matrix's update before the learning rate, for a rule that needs full "
        "gradients. With 0 nothing is clipped.", ge=0, le=1e9,
    )  # fmt: skip
    optimizer: str | None = key(
        None, "The optimizer of the projected gradients: `adamw8bit`, `adamw4bit`, `adamw`, or the dotted path of a "
        "torch.optim.Optimizer class.", min_length=1, example="torch.optim.Adafactor", unset="the method's own",
    )  # fmt: skip
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = key(
        (0.9, 0.999), "Adam's decay rates of the first and the second moment."
    )
    eps: float = key(1e-8, "Adam's ε, added to the root of the second moment.", gt=0, le=1)
    optimizer_options: dict[str, Any] = key(
        {}, "Arguments of an optimizer given by its dotted path.",
        rule="a mapping of argument names to values, such as {momentum: 0.9}", example={"momentum": 0.9},
    )  # fmt: skip
    order: Literal["auto", "layer_major", "batch_major"] = key(
        "auto", "Whether all micro-batches of a step go through one block before the next one begins (`layer_major`), "
        "or one micro-batch after another goes through the whole model (`batch_major`). With `auto` the steps are "
        "layer-major where the model can be walked block by block.",
    )  # fmt: skip
    stepping: Literal["auto", "fused", "deferred"] = key(
        "auto",
        "Whether a tensor steps as soon as its gradient is there (`fused`), or all step at the end (`deferred`). "
        "It is for batch-major steps.",
    )
    full_gradients: Literal["free", "keep"] = key(
        "free",
        "With `keep`, a rule that needs full gradients may step deferred. It then keeps those of all layers at once.",
    )
    activation_checkpointing: StrictBool | Literal["auto", "offload"] | Annotated[int, Field(ge=1, le=SIDE)] = key(
        "auto", "Whether blocks run again in the backward pass, which saves their activations (`true`), and whether "
        "their inputs wait in host memory until then (`offload`). A number says how many of the last blocks keep their "
        "activations; the others run again. With `auto` the plan takes the fastest way that it has room for.",
    )  # fmt: skip
    eval_every: int = key(
        100, "How often the held-out loss is measured. It also is before the first step and after the last.",
        unit="optimizer steps", ge=1, le=STEPS,
    )  # fmt: skip
    eval_batches: int | None = key(
        None, "The held-out loss is measured on this many micro-batches of each held-out set.", unit="micro-batches",
        ge=1, le=STEPS, example=50, unset="on all of the held-out data",
    )  # fmt: skip
    save_every: int | None = key(
        None, "How often a checkpoint is saved.", unit="optimizer steps", ge=1, le=STEPS, example=500,
        unset="after every 30 minutes of work, and at the end",
    )  # fmt: skip
    keep_last: int = key(2, "How many of the newest checkpoints are kept.", unit="checkpoints", ge=1, le=STEPS)
    keep_every: int | None = key(
        None, "Checkpoints of steps that are multiples of this are kept as well.", unit="optimizer steps", ge=1,
        le=STEPS, example=10_000, unset="none of them",
    )  # fmt: skip
    keep_best: bool = key(False, "Whether to save and keep the checkpoint with the lowest held-out loss.")
    early_stopping: int | None = key(
        None, "The run stops after this many evaluations without a lower held-out loss.", unit="evaluations", ge=1,
        le=STEPS, example=5, unset="the run never stops early",
    )  # fmt: skip
    max_skipped_in_a_row: int = key(
        5, "If a loss or gradient is not finite, its step is skipped. More of them in a row than this end the run.",
        unit="optimizer steps", ge=1, le=STEPS,
    )  # fmt: skip
    loss_spike: Literal["off", "warn", "skip", "rollback"] = key(
        "warn",
        "What to do about a loss far above those before it: nothing, a printed line, no step, or back to a checkpoint.",
    )
    spike_threshold: float = key(
        8.0, "How far above the mean of the last 100 losses a spike begins.", unit="standard deviations", gt=0, le=1e6
    )

    @property
    def steps(self) -> int:
        """The optimizer steps of the run. Where ``epochs`` are given, they are only known once the data are, and then
        :func:`duration.with_steps` sets ``max_steps``."""
        assert self.max_steps is not None, "the steps of a run given in epochs are asked for before its data are known"
        return self.max_steps


Rule = Literal["galore", "apollo", "apollo_mini", "scale", "fira", "muon", "sinkgd"]


class LowRankSection(Section):
    rank: Annotated[int, Field(ge=1, le=SIDE)] | Literal["full", "auto"] = key(
        128,
        "Columns of a basis. With `full`, gradients are not projected. With `auto`, each layer has a rank of its own.",
    )
    energy: float = key(
        0.9, "The share of a gradient's energy that a layer's rank keeps, for `rank: auto`.", gt=0, le=1
    )
    max_rank: int | None = key(
        None, "The largest rank of a layer, for `rank: auto`.", ge=8, le=SIDE, example=256,
        unset="a quarter of the layer's smaller side",
    )  # fmt: skip
    mean_rank: int | None = key(
        None, "All layers together stay within the memory of this rank, for `rank: auto`.", ge=8, le=SIDE, example=128,
        unset="no such limit",
    )  # fmt: skip
    rule: Rule = key("galore", "How a matrix's gradient becomes its update. [method.md](method.md) has the equations.")
    momentum: Literal["4bit", "8bit", "bf16", "fp32"] = key(
        "4bit", "How the momentum of a matrix is kept between steps, for `rule: muon`."
    )
    mu: float = key(0.8, "The share of the old momentum in the new one, for `rule: muon`.", ge=0, lt=1)
    alpha: float | None = key(
        None,
        "The factor of a LoRA update, which is alpha / rank · B A. It is for `method: lora`.",
        gt=0,
        le=1e6,
        example=16,
        unset="alpha = rank",
    )
    scale: float | None = key(
        None, "The factor of an update in a low-rank layer.", gt=0, le=1e6, example=0.25, unset="the rule's own"
    )
    proj_type: Literal["std", "reverse_std", "left", "right", "full"] = key(
        "std",
        "Which side of the gradient is projected: the smaller (`std`), the larger, a fixed one, or both (`full`).",
    )
    update_proj_gap: int = key(
        200,
        "The time between two refreshes of a basis, which are searches for a new one.",
        unit="optimizer steps",
        ge=1,
        le=STEPS,
    )
    cos_threshold: float | None = key(
        None, "A similarity of successive bases from which a layer counts as settled, so that its gap grows.", ge=0,
        le=1, example=0.4, unset="the policy's own; policy: fixed is for gaps that never grow",
    )  # fmt: skip
    gamma_proj: float = key(2.0, "The factor by which a settled layer's gap grows.", ge=1, le=1e6)
    queue_size: int = key(
        5,
        "How many of the last similarities are averaged and held against lowrank.cos_threshold.",
        unit="refreshes",
        ge=1,
        le=SIDE,
    )
    max_gap: int | None = key(
        None,
        "The longest time between two refreshes of a basis.",
        unit="optimizer steps",
        ge=1,
        le=16 * STEPS,
        example=1000,
        unset="16 · update_proj_gap",
    )
    stagger: bool = key(True, "Whether refreshes are spread over the gap, or come in the same step for all layers.")
    projector: Literal["randomized", "exact"] = key(
        "randomized", "How a basis is found. With `exact` it comes from a whole SVD."
    )
    policy: Literal["overlap", "first_vector", "signed_cosine", "energy", "fixed"] = key(
        "overlap", "What decides when a basis is refreshed. [method.md](method.md) compares the policies."
    )
    moments: Literal["rotate", "keep", "reset"] = key(
        "rotate", "What becomes of Adam's moments at a refresh: turned into the new basis, kept as they are, or zero."
    )
    weight_format: Literal["int8", "none"] | None = key(
        None, "How weights of low-rank layers are kept.", example="int8", unset="the method's own"
    )
    group_size: Literal[128, 64, 32, "row"] = key(
        128, "How many weights along a row share one scale. With `row` the whole row does.", unit="weights"
    )
    weight_scales: Literal["sticky", "rederived"] = key(
        "sticky",
        "Whether scales of int8 weights stay until they must grow, or are derived in every step, as published.",
    )
    weight_rounding: Literal["stochastic", "nearest"] = key("stochastic", "How an update is rounded into int8 weights.")
    basis_format: Literal["int4", "nf4", "bf16", "fp32"] | None = key(
        None, "How bases are kept.", example="bf16", unset="the method's own"
    )
    grad_dtype: Literal["float32", "bfloat16"] | None = key(
        None, "The number format of projected gradients.", example="float32",
        unset="float32, or bfloat16 in a step of one micro-batch in bfloat16",
    )  # fmt: skip
    embeddings: Literal["full", "int8"] = key(
        "full", "With `int8` the input embedding and the head are low-rank layers too."
    )
    include: list[str] = key(
        [], "Patterns of the only layers to convert. An empty list stands for all.", example=["*.mlp.*"]
    )
    exclude: list[str] = key([], "Patterns of layers to leave as they are.", example=["*.q_proj"])


SIZE = r"^\s*(\d{1,9}(?:\.\d{1,9})?)\s*([KMGT])(i?)B\s*$"


def bytes_of(text: str) -> int:
    """``"15.5GiB"`` → bytes; GB, MiB and MB too. Raises ``ValueError``."""
    match = re.match(SIZE, text)
    if not match or float(match[1]) <= 0:
        raise ValueError(f"{text!r} is not a size such as 15.5GiB or 16GB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** ("KMGT".index(match[2]) + 1))


class MemorySection(Section):
    budget: str | None = key(
        None, "What the run may use of the device's memory.", unit="GiB, GB, MiB or MB", example="15.5GiB",
        unset="what the device has free", rule="a size with its unit, such as 15.5GiB or 16GB",
    )  # fmt: skip
    host_budget: str | None = key(
        None, "What the run may use of the host's memory for what a GPU has no room for, such as the blocks' inputs.",
        unit="GiB, GB, MiB or MB", example="24GiB", unset="no limit is checked",
        rule="a size with its unit, such as 15.5GiB or 16GB",
    )  # fmt: skip
    stream: Literal["none", "weights", "all", "auto"] = key(
        "none",
        "What of the blocks lives in host memory and comes to the device for a block's turn. `weights` are weights and "
        "bases, `all` the optimizer's state too. `auto` streams what must be streamed for the run to fit.",
    )
    slots: int = key(
        2, "How many blocks have room on the device with `memory.stream`. Two will do; with three the copies of one "
        "direction do not wait for those of the other.", ge=2, le=8,
    )  # fmt: skip

    @property
    def streams(self) -> bool:
        """Whether some of the blocks live in host memory; False while that is still to be decided."""
        return self.stream in ("weights", "all")

    @field_validator("budget", "host_budget")
    @classmethod
    def _readable(cls, value: str | None) -> str | None:
        if value is not None:
            bytes_of(value)
        return value


class ExportSection(Section):
    formats: list[Literal["hf", "int8", "gguf"]] = key(
        ["hf"],
        "What to write after training. `hf` is for transformers, `int8` for vLLM and `gguf` for llama.cpp.",
        example=["hf", "gguf"],
    )
    which: Literal["last", "best"] = key(
        "last", "Whether to export the last weights, or the best, which train.keep_best kept."
    )

    @field_validator("formats")
    @classmethod
    def _each_once(cls, value: list[str]) -> list[str]:
        return once(value)


class SampleSection(Section):
    prompt: str | None = key(
        None,
        "The text that the sample printed after training continues.",
        example="It was",
        unset="the beginning of a held-out document",
    )
    max_new_tokens: int = key(60, "The length of the sample. With 0 none is printed.", unit="tokens", ge=0, le=SIDE)


Method = Literal["qgalore", "galore", "galore8bit", "lora", "adamw", "adamw8bit"]


class Config(Section):
    method: Method = key("qgalore", "The method, which is a set of number formats with an optimizer.")
    device: Literal["auto", "cuda", "cpu"] = key("auto", "Where to train. With `auto` it is a GPU if PyTorch sees one.")
    kernels: Literal["auto", "reference", "triton"] = key(
        "auto", "The code of quantized steps. With `auto` it is Triton on a GPU and plain PyTorch elsewhere."
    )
    parallel: Mesh = key(
        Mesh(), "How the processes that torchrun starts hold the model. Each has all of it, or some of its rows "
        "(`shard`). With both sizes there are as many copies as `replicate` says, each split over as many processes "
        "as `shard` says. These are neighbours, so that a copy can be on one machine.",
        rule="replicate or shard, or a mapping that gives both a size from 1 to 65,536",
        example={"replicate": 2, "shard": 4},
    )  # fmt: skip
    tracking: list[Literal["tensorboard", "wandb", "trackio"]] = key(
        [], "Where the run's figures are shown while it trains. An empty list stands for its own files alone.",
        example=["tensorboard"],
    )  # fmt: skip
    run: RunSection = Field(RunSection(), description="The run's name, place and seed.")
    model: ModelSection = Field(..., description="The model, from scratch or pretrained.")
    data: DataSection = Field(..., description="What is trained on, and how it is read.")
    train: TrainSection = Field(..., description="Steps, rates, evaluation and saving.")
    lowrank: LowRankSection = Field(LowRankSection(), description="Projection and quantization of the weight matrices.")
    memory: MemorySection = Field(MemorySection(), description="Limits of memory.")
    export: ExportSection = Field(ExportSection(), description="What is written after training.")
    sample: SampleSection = Field(SampleSection(), description="The text printed after training.")

    @field_validator("tracking")
    @classmethod
    def _each_once(cls, value: list[str]) -> list[str]:
        return once(value)


ADAMS = ("adamw8bit", "adamw4bit", "adamw")  # the inner optimizers with names of their own

# What a method means: (converted?, weight format, basis format or None for the model's dtype, inner optimizer).
METHODS: dict[str, tuple[bool, str, str | None, str]] = {
    "qgalore": (True, "int8", "int4", "adamw8bit"),
    "galore": (True, "none", None, "adamw"),
    "galore8bit": (True, "none", None, "adamw8bit"),
    "lora": (True, "int8", None, "adamw8bit"),
    "adamw": (False, "none", None, "adamw"),
    "adamw8bit": (False, "none", None, "adamw8bit"),
}
