"""The keys of a configuration, their types and defaults, and the rules between them."""

import re
import types
import typing
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from pydantic import model_validator as validator


def _scalar_types(annotation: Any) -> set[type]:
    args = typing.get_args(annotation)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        return set().union(*(_scalar_types(arg) for arg in args if isinstance(arg, type) or typing.get_origin(arg)))
    return {annotation} if isinstance(annotation, type) else set()


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @validator(mode="before")
    @classmethod
    def _no_bool_as_number(cls, data: Any) -> Any:
        """pydantic would read ``rank: true`` as 1."""
        for name, value in data.items() if isinstance(data, dict) else ():
            info = cls.model_fields.get(name)
            if isinstance(value, bool) and info is not None and bool not in _scalar_types(info.annotation):
                raise ValueError(f"{name} is {value!r}, which is neither a number nor a name")
        return data


class RunSection(Section):
    name: str = Field("run", pattern=r"^\w[\w.+-]*$", max_length=200)
    dir: str = "runs"
    seed: int = Field(0, ge=0, lt=2**63)


class ModelSection(Section):
    config: str | None = None  # preset name, or a Hugging Face config.json or its folder: trained from scratch
    path: str | None = None  # pretrained folder or hub id: continued
    overrides: dict[str, Any] = {}  # fields of the Hugging Face config to change, from scratch only
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    compute: Literal["bf16", "int8"] = "bf16"  # int8: low-rank layers multiply integers; bf16: in model.dtype
    compile: Literal["none", "blocks"] = "none"  # blocks: torch.compile of each transformer block


class DataSection(Section):
    task: Literal["text", "instruct", "classify"] = "text"  # instruct: conversations, with the loss on answers only
    train: str
    valid: str | None = None  # None: the last valid_fraction of train
    valid_fraction: float = Field(0.01, gt=0, lt=0.5)
    tokenizer: str | None = None  # folder, tokenizer.json or hub id; None: byte-level BPE trained on data.train
    vocab_size: PositiveInt = 8192  # of a tokenizer trained here
    sequence_length: PositiveInt = 256
    valid_split: str = "validation"  # of a data.valid that is a hub id; train reads the split "train"
    text_key: str = "text"
    document_attention: Literal["isolated", "joined"] = "isolated"
    max_tokens: PositiveInt | None = None  # stop reading data.train there; None: all of a file, enough of a hub stream
    cache_dir: str = "cache"
    # of task: classify, whose data are local tables (.tsv, .csv, .jsonl, .parquet)
    text_keys: list[str] = Field(["sentence"], min_length=1, max_length=2)  # one text or a pair
    label_key: str = "label"
    label_type: Literal["class", "number"] = "class"  # number: regression on one value
    header: bool = True  # false: columns are called "0", "1", …
    metric: list[Literal["accuracy", "f1", "matthews", "pearson", "spearman"]] = []  # empty: all that suit the labels


class TrainSection(Section):
    max_steps: int = Field(gt=0, lt=2**40)
    micro_batch_size: int = Field(8, gt=0, lt=2**20)
    grad_accumulation: int = Field(1, gt=0, lt=2**20)  # micro-batches of a step, of all processes together
    lr: float = Field(gt=0)
    weight_decay: NonNegativeFloat = 0.0
    warmup_steps: NonNegativeInt = 0
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    min_lr_ratio: float = Field(0.1, ge=0, le=1)  # lr at the last step, as a share of train.lr
    clip_grad_norm: NonNegativeFloat = 0.0  # global norm; 0: off
    optimizer: str | None = None  # adamw8bit | adamw4bit | adamw | dotted path; None: the method's
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    optimizer_options: dict[str, Any] = {}
    stepping: Literal["auto", "fused", "deferred"] = "auto"
    full_gradients: Literal["free", "keep"] = "free"  # keep: a rule that needs them whole may step deferred
    activation_checkpointing: bool | Literal["auto", "offload"] = "auto"  # auto: the fastest that the plan has room for
    eval_every: PositiveInt = 100
    eval_batches: PositiveInt | None = None  # None: all of the held-out text
    save_every: PositiveInt | None = None  # None: at the end only
    keep_last: PositiveInt = 2  # checkpoints kept, the newest
    keep_every: PositiveInt | None = None  # and those of steps that are multiples of this
    keep_best: bool = False  # and the one with the lowest held-out loss, saved when it is evaluated
    early_stopping: PositiveInt | None = None  # stop after so many evaluations without a lower held-out loss
    max_skipped_in_a_row: PositiveInt = 5  # steps with a loss or gradient that is not finite are skipped, up to this
    loss_spike: Literal["off", "warn", "skip", "rollback"] = "warn"
    spike_threshold: float = Field(8.0, gt=0)  # standard deviations above the mean of the last 100 losses

    @validator(mode="before")
    @classmethod
    def _off_is_a_word(cls, data: Any) -> Any:
        """YAML reads an unquoted ``off`` as false."""
        return {**data, "loss_spike": "off"} if isinstance(data, dict) and data.get("loss_spike") is False else data


Rule = Literal["galore", "apollo", "apollo_mini", "scale", "fira"]


class LowRankSection(Section):
    rank: PositiveInt | Literal["full", "auto"] = 128
    energy: float = Field(0.9, gt=0, le=1)  # of rank: auto: the share of the gradient's energy that a layer keeps
    max_rank: int | None = Field(None, ge=8)  # of rank: auto, a layer's limit; None: a quarter of its smaller side
    mean_rank: int | None = Field(None, ge=8)  # of rank: auto: all layers stay within this uniform rank's memory
    rule: Rule = "galore"  # how a matrix's gradient becomes its update: docs/method.md
    alpha: float | None = Field(None, gt=0)  # of method lora, whose update is alpha / rank · B A; None: rank
    scale: float | None = Field(None, gt=0)  # None: the rule's own
    proj_type: Literal["std", "reverse_std", "left", "right", "full"] = "std"
    update_proj_gap: PositiveInt = 200
    cos_threshold: float | None = None  # None: the policy's own
    gamma_proj: float = Field(2.0, ge=1)
    queue_size: PositiveInt = 5
    max_gap: PositiveInt | None = None
    stagger: bool = True
    projector: Literal["randomized", "exact"] = "randomized"
    policy: Literal["overlap", "first_vector", "signed_cosine", "energy", "fixed"] = "overlap"  # when to refresh
    moments: Literal["rotate", "keep", "reset"] = "rotate"
    weight_format: Literal["int8", "none"] | None = None  # None: the method's
    group_size: Literal[128, 64, 32, "row"] = 128
    weight_scales: Literal["sticky", "rederived"] = "sticky"  # of int8 weights; rederived at every step: as published
    weight_rounding: Literal["stochastic", "nearest"] = "stochastic"  # of an update into int8
    basis_format: Literal["int4", "nf4", "bf16", "fp32"] | None = None  # None: the method's
    grad_dtype: Literal["float32", "bfloat16"] | None = None  # None: float32, but bfloat16 where nothing is added to it
    embeddings: Literal["full", "int8"] = "full"  # int8: the input embedding and the head are low-rank layers too
    include: list[str] = []
    exclude: list[str] = []


def bytes_of(text: str) -> int:
    """``"15.5GiB"`` → bytes; GB, MiB and MB too. Raises ``ValueError``."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT])(i?)B\s*", text)
    if not match or float(match[1]) <= 0:
        raise ValueError(f"{text!r} is not a size such as 15.5GiB or 16GB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** ("KMGT".index(match[2]) + 1))


class MemorySection(Section):
    budget: str | None = None  # such as 15.5GiB; None: what the device has free

    @validator(mode="after")
    def _readable(self) -> "MemorySection":
        if self.budget is not None:
            bytes_of(self.budget)
        return self


class ExportSection(Section):
    formats: list[Literal["hf", "int8", "gguf"]] = ["hf"]
    which: Literal["last", "best"] = "last"  # best: the weights that train.keep_best kept


class SampleSection(Section):
    prompt: str | None = None  # None: the beginning of a held-out document
    max_new_tokens: NonNegativeInt = 60


Method = Literal["qgalore", "galore", "galore8bit", "lora", "adamw", "adamw8bit"]


class Config(Section):
    method: Method = "qgalore"
    device: Literal["auto", "cuda", "cpu"] = "auto"
    kernels: Literal["auto", "reference", "triton"] = "auto"  # auto: Triton on a GPU
    parallel: Literal["replicate", "shard"] = "replicate"  # of a job that torchrun starts; shard: weights by rows
    run: RunSection = RunSection()
    model: ModelSection
    data: DataSection
    train: TrainSection
    lowrank: LowRankSection = LowRankSection()
    memory: MemorySection = MemorySection()
    export: ExportSection = ExportSection()
    sample: SampleSection = SampleSection()

    def problems(self) -> list[str]:
        """Rules between keys. All that are broken, each with its remedy."""
        train, found = self.train, []
        if (self.model.config is None) == (self.model.path is None):
            found.append("model: give exactly one of model.config (from scratch) and model.path (pretrained)")
        if self.model.path is not None and self.model.overrides:
            found.append("model.overrides: changes the shape of a pretrained model; it goes with model.config only")
        if self.model.compile == "blocks" and train.activation_checkpointing == "offload":
            found.append(
                "model.compile: blocks keep activations on the device; set train.activation_checkpointing: true"
            )
        if self.parallel == "shard":
            found += self._shard_problems()
        if train.stepping == "fused" and train.clip_grad_norm > 0:
            found.append("train.stepping: fused cannot clip the global norm; use deferred, or clip_grad_norm: 0")
        found += self._compute_problems()
        found += self._rule_problems() if self.method != "lora" else self._lora_problems()
        found += self._rank_problems()
        if "int8" in self.export.formats and (self.lowrank.weight_format or METHODS[self.method][1]) != "int8":
            found.append(f"export.formats: int8 needs int8 weights, which method {self.method} does not keep; use hf")
        found += self._problems_of_task()
        if self.export.which == "best" and not train.keep_best:
            found.append("export.which: best needs the best checkpoint kept; set train.keep_best: true")
        if not all(0 <= beta < 1 for beta in train.betas):
            found.append(f"train.betas: {list(train.betas)} must both lie in [0, 1)")
        fields = TrainSection.model_fields
        plain = train.betas == fields["betas"].default and train.eps == fields["eps"].default
        if train.optimizer not in (None, *ADAMS) and not plain:
            found.append(f"train.betas, train.eps: {train.optimizer} takes its options from train.optimizer_options")
        return found

    def _shard_problems(self) -> list[str]:
        """What weights split by rows do not go with."""
        low, train, model = self.lowrank, self.train, self.model
        right = low.proj_type == "right" or low.rank == "full"
        wanted = (
            ("method", self.method, METHODS[self.method][0] and self.method != "lora", "qgalore, galore or galore8bit"),
            ("lowrank.proj_type", low.proj_type, right, "right: a left basis moves every row by the whole of Δ"),
            ("lowrank.rank", low.rank, low.rank != "auto", "a number"),
            ("lowrank.rule", low.rule, low.rule == "galore", "galore"),
            ("lowrank.embeddings", low.embeddings, low.embeddings == "full", "full, which each process holds whole"),
            ("model.compile", model.compile, model.compile == "none", "none"),
            ("model.compute", model.compute, model.compute == "bf16", "bf16"),
            ("train.optimizer", train.optimizer, train.optimizer in (None, "adamw8bit", "adamw"), "adamw8bit or adamw"),
            ("train.stepping", train.stepping, train.stepping != "fused", "deferred"),
            (
                "train.activation_checkpointing",
                train.activation_checkpointing,
                train.activation_checkpointing != "offload",
                "true",
            ),
            ("data.task", self.data.task, self.data.task != "classify", "text or instruct"),
        )
        return [
            f"{key}: {value} does not go with parallel: shard; use {remedy}, or parallel: replicate"
            for key, value, fine, remedy in wanted
            if not fine
        ]

    def _compute_problems(self) -> list[str]:
        low, (converted, weight_format, *_) = self.lowrank, METHODS[self.method]
        if self.model.compile == "blocks" and low.rank == "auto" and converted:
            return ["model.compile: blocks would make a graph for each rank; use a number for lowrank.rank"]
        if self.model.compute == "bf16":
            return []
        if self.method == "lora" or not converted or (low.weight_format or weight_format) != "int8":
            return [f"model.compute: int8 is for trained int8 weights, which method {self.method} has not; use bf16"]
        if low.group_size != "row":
            return ["model.compute: int8 needs one scale for a row of weights; set lowrank.group_size: row"]
        return []

    def _lora_problems(self) -> list[str]:
        found = []
        if self.lowrank.rank in ("full", "auto"):
            found.append("lowrank.rank: method lora needs the rank of its factors; give a number")
        if self.lowrank.embeddings == "int8":
            found.append("lowrank.embeddings: int8 ones are low-rank layers, which method lora freezes; use full")
        if other := [name for name in self.export.formats if name != "hf"]:
            found.append(f"export.formats: method lora's merged weights are not int8, as {other[0]} needs them; use hf")
        return found

    def _rank_problems(self) -> list[str]:
        """Rules for ``lowrank.rank: auto``."""
        low, found = self.lowrank, []
        if low.rank != "auto" or not METHODS[self.method][0] or self.method == "lora":
            return found
        if low.rule != "galore":
            found.append(f"lowrank.rank: auto goes with rule: galore; rule {low.rule} needs a number")
        if low.proj_type == "full":
            found.append("lowrank.proj_type: full has two bases, and rank: auto goes by one spectrum; use another")
        if low.max_rank is not None and low.mean_rank is not None and low.mean_rank > low.max_rank:
            found.append(
                f"lowrank.mean_rank: {low.mean_rank} is above max_rank, {low.max_rank}; lower it or raise that"
            )
        return found

    def _rule_problems(self) -> list[str]:
        """What a rule that needs full gradients cannot work with."""
        train, rule = self.train, self.lowrank.rule
        if rule == "galore" or not METHODS[self.method][0]:
            return []
        found = []
        if rule == "apollo" and self.lowrank.rank == "full":
            found.append("lowrank.rank: rule apollo needs the rank of its random projection; give a number")
        asked = {
            f"train.grad_accumulation: {train.grad_accumulation}": train.grad_accumulation > 1,
            f"train.clip_grad_norm: {train.clip_grad_norm:g}": train.clip_grad_norm > 0,
            "train.stepping: deferred": train.stepping == "deferred",
        }
        if train.full_gradients == "free" and any(asked.values()):
            found.append(
                f"{' and '.join(key for key, given in asked.items() if given)}: rule {rule} needs full gradients, and "
                "would keep those of all layers at once until the step: 4 bytes (lowrank.grad_dtype: bfloat16: 2) for "
                "each of their weights, 24 GiB for a 7B model; accept that with train.full_gradients: keep, or use "
                "grad_accumulation 1 without clipping"
            )
        return found

    def _problems_of_task(self) -> list[str]:
        """Rules for ``data.task: classify``, and keys that mean nothing without it."""
        if self.data.task != "classify":
            own = {
                name: DataSection.model_fields[name].default for name in ("label_key", "label_type", "header", "metric")
            }
            given = sorted(name for name, default in own.items() if getattr(self.data, name) != default)
            return [f"data.{name}: goes with data.task: classify only" for name in given]
        found = []
        if self.data.valid is None:
            found.append("data.valid: data.task: classify needs held-out data")
        if self.model.path is None and self.data.tokenizer is None:
            found.append("data.tokenizer: data.task: classify needs one, or a model.path that has one")
        if set(self.export.formats) - {"hf"}:
            found.append("export.formats: a classifier is exported as hf only")
        suits = {"pearson", "spearman"} if self.data.label_type == "number" else {"accuracy", "f1", "matthews"}
        if wrong := sorted(set(self.data.metric) - suits):
            found.append(
                f"data.metric: {wrong[0]} does not suit data.label_type: {self.data.label_type}; "
                f"use {', '.join(sorted(suits))}"
            )
        return found


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

# The cos_threshold of a policy that reads one: measured for overlap (docs/results.md), published for the others.
THRESHOLDS = {"overlap": 0.2, "first_vector": 0.4, "signed_cosine": 0.4}

# What a rule means: (its scale, whether it uses stored bases, the other low-rank keys that it reads).
RULES: dict[str, tuple[float, bool, tuple[str, ...]]] = {
    "galore": (0.25, True, ()),
    "apollo": (1.0, False, ("rank", "update_proj_gap")),
    "apollo_mini": (128.0**0.5, False, ("update_proj_gap",)),
    "scale": (1.0, False, ()),
    "fira": (1.0, True, ()),
}
