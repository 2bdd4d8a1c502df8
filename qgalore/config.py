"""The configuration: pydantic models, YAML, overrides. The only module that knows YAML.

``load`` gives a validated :class:`Config` or one :class:`ConfigError` with every problem; ``resolve`` fills in what
the method and the device decide. Nothing mutates a configuration afterwards, and none travels below ``build.py``.
"""

import difflib
import re
import types
import typing
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveInt, ValidationError
from pydantic import model_validator as validator

from .errors import ConfigError

PACKAGED = Path(__file__).resolve().parent.parent / "configs"


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


class DataSection(Section):
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


class TrainSection(Section):
    max_steps: int = Field(gt=0, lt=2**40)
    micro_batch_size: int = Field(8, gt=0, lt=2**20)
    grad_accumulation: int = Field(1, gt=0, lt=2**20)
    lr: float = Field(gt=0)
    weight_decay: NonNegativeFloat = 0.0
    warmup_steps: NonNegativeInt = 0
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    min_lr_ratio: float = Field(0.1, ge=0, le=1)  # lr at the last step, as a share of train.lr
    clip_grad_norm: NonNegativeFloat = 0.0  # global norm; 0: off
    optimizer: str | None = None  # adamw8bit | adamw | dotted path; None: the method's
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    optimizer_options: dict[str, Any] = {}
    stepping: Literal["auto", "fused", "deferred"] = "auto"
    activation_checkpointing: bool | Literal["auto", "offload"] = "auto"  # auto: the fastest that the plan has room for
    eval_every: PositiveInt = 100
    eval_batches: PositiveInt | None = None  # None: all of the held-out text
    save_every: PositiveInt | None = None  # None: at the end only
    keep_last: PositiveInt = 2  # checkpoints kept, the newest
    keep_every: PositiveInt | None = None  # and those of steps that are multiples of this
    max_skipped_in_a_row: PositiveInt = 5  # steps with a loss or gradient that is not finite are skipped, up to this
    loss_spike: Literal["off", "warn", "skip", "rollback"] = "warn"
    spike_threshold: float = Field(8.0, gt=0)  # standard deviations above the mean of the last 100 losses


class LowRankSection(Section):
    rank: PositiveInt | Literal["full"] = 128
    scale: float = Field(0.25, gt=0)
    proj_type: Literal["std", "reverse_std", "left", "right", "full"] = "std"
    update_proj_gap: PositiveInt = 200
    cos_threshold: float = 0.4
    gamma_proj: float = Field(2.0, ge=1)
    queue_size: PositiveInt = 5
    max_gap: PositiveInt | None = None
    stagger: bool = True
    projector: Literal["randomized", "exact"] = "randomized"
    similarity: Literal["overlap", "first_vector"] = "overlap"
    moments: Literal["rotate", "keep", "reset"] = "rotate"
    weight_format: Literal["int8", "none"] | None = None  # None: the method's
    group_size: Literal[128, 64, 32, "row"] = 128
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


class SampleSection(Section):
    prompt: str | None = None  # None: the beginning of a held-out document
    max_new_tokens: NonNegativeInt = 60


Method = Literal["qgalore", "galore", "galore8bit", "adamw", "adamw8bit"]


class Config(Section):
    method: Method = "qgalore"
    device: Literal["auto", "cuda", "cpu"] = "auto"
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
        if train.stepping == "fused" and train.grad_accumulation > 1:
            found.append(
                "train.stepping: fused takes one backward pass a step; use deferred with grad_accumulation > 1"
            )
        if train.stepping == "fused" and train.clip_grad_norm > 0:
            found.append("train.stepping: fused cannot clip the global norm; use deferred, or clip_grad_norm: 0")
        if "int8" in self.export.formats and (self.lowrank.weight_format or METHODS[self.method][1]) != "int8":
            found.append(f"export.formats: int8 needs int8 weights, which method {self.method} does not keep; use hf")
        if not all(0 <= beta < 1 for beta in train.betas):
            found.append(f"train.betas: {list(train.betas)} must both lie in [0, 1)")
        fields = TrainSection.model_fields
        plain = train.betas == fields["betas"].default and train.eps == fields["eps"].default
        if train.optimizer not in (None, "adamw", "adamw8bit") and not plain:
            found.append(f"train.betas, train.eps: {train.optimizer} takes its options from train.optimizer_options")
        return found


# What a method means: (converted?, weight format, basis format or None for the model's dtype, inner optimizer).
METHODS: dict[str, tuple[bool, str, str | None, str]] = {
    "qgalore": (True, "int8", "int4", "adamw8bit"),
    "galore": (True, "none", None, "adamw"),
    "galore8bit": (True, "none", None, "adamw8bit"),
    "adamw": (False, "none", None, "adamw"),
    "adamw8bit": (False, "none", None, "adamw8bit"),
}


def find(name: str) -> Path:
    """The file meant by ``--config NAME``: as given, or in the project's ``configs/`` (with or without ``.yaml``)."""
    for candidate in (Path(name), PACKAGED / name, PACKAGED / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    known = sorted(path.name for path in PACKAGED.glob("*.yaml"))
    close = difflib.get_close_matches(name, known + [k.removesuffix(".yaml") for k in known], n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise ConfigError(f"--config {name}: no such file here or in configs/. {hint}There are: {', '.join(known)}")


class _UniqueKeys(yaml.SafeLoader):
    """YAML lets the last of two equal keys win silently."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        if twice := {key for key in keys if keys.count(key) > 1}:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {min(twice)!r} is given twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def _read(path: Path) -> dict[str, Any]:
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path} holds {'nothing' if data is None else type(data).__name__}, not a mapping of sections"
        )
    return data


def _override(data: dict[str, Any], assignment: str) -> None:
    key, equals, text = assignment.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise ConfigError(f"override {assignment!r} is not of the form key.sub=value, for example train.lr=0.001")
    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError as error:
        raise ConfigError(f"override {assignment!r}: the value is not YAML: {error}") from error
    for part in parts[:-1]:
        data = data.setdefault(part, {})
        if not isinstance(data, dict):
            raise ConfigError(f"override {assignment!r}: {part} is a value, not a section")
    data[parts[-1]] = value


def _section_at(location: tuple) -> type[Section] | None:
    section: Any = Config
    for part in location:
        field = section.model_fields.get(part) if isinstance(section, type) and issubclass(section, Section) else None
        section = field.annotation if field is not None else None
        if not (isinstance(section, type) and issubclass(section, Section)):
            return None
    return section


def _all_keys(section: type[Section] = Config, prefix: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            keys += _all_keys(field.annotation, f"{prefix}{name}.")
    return keys


def _describe(error: dict[str, Any]) -> str:
    location = tuple(error["loc"])
    # past a section and its key, pydantic names the members of a union, which mean nothing to a user
    named = location[:2] if _section_at(location[:1]) else location[:1]
    key = ".".join(str(part) for part in (location if error["type"] == "extra_forbidden" else named))
    if error["type"] == "extra_forbidden":
        section = _section_at(location[:-1])
        names = list(section.model_fields) if section else []
        near = difflib.get_close_matches(str(location[-1]), names, n=1)
        close = [".".join([*map(str, location[:-1]), near[0]])] if near else []
        close = close or [k for k in _all_keys() if k.rsplit(".", 1)[-1] == location[-1]][:1]
        hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(names)}"
        return f"{key}: unknown key; {hint}"
    if error["type"] == "missing" and len(location) <= 2:
        return f"{key}: missing, and it has no default"
    return f"{key}: {error['msg']} (got {error['input']!r})"


def parse(data: dict[str, Any], origin: str) -> Config:
    """Validate ``data``; raises one :class:`ConfigError` that lists every problem, prefixed with ``origin``."""
    try:
        config = Config.model_validate(data)
        problems = config.problems()
    except ValidationError as error:
        # a union reports one problem for each of its members; one line for each key is enough
        problems = list({e["loc"][:2]: _describe(e) for e in reversed(error.errors())}.values())[::-1]
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise ConfigError(f"{origin}: {count}\n" + "\n".join(f"  {line}" for line in problems))
    return config


def _anchor(path: str | None, folder: Path) -> str | None:
    """A data path that does not exist as given but does beside the configuration file means the latter."""
    if path is None:
        return None
    path = str(Path(path).expanduser()) if path.startswith("~") else path
    try:
        beside = not Path(path).exists() and (folder / path).exists()
    except OSError as error:
        raise ConfigError(f"{path[:60]!r} cannot be a path: {error.strerror}") from error
    return str(folder / path) if beside else path


def load(name: str, overrides: list[str] | None = None) -> Config:
    """Read the file for ``name``, apply ``key.sub=value`` overrides, validate. Paths are relative to the working
    directory, or else to the file's folder."""
    path = find(name)
    data = _read(path)
    for assignment in overrides or []:
        _override(data, assignment)
    config = parse(data, str(path))
    anchored = {k: _anchor(getattr(config.data, k), path.parent) for k in ("train", "valid", "tokenizer")}
    model = {k: _anchor(getattr(config.model, k), path.parent) for k in ("config", "path")}
    anchored["cache_dir"] = str(Path(config.data.cache_dir).expanduser())
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"dir": str(Path(config.run.dir).expanduser())}),
            "data": config.data.model_copy(update=anchored),
            "model": config.model.model_copy(update=model),
        }
    )


def resolve(config: Config, device: str, bf16: bool) -> Config:
    """Fill in what ``method`` and ``device`` ("cuda" or "cpu"; ``bf16``: the device computes in it) decide."""
    _, weight_format, basis_format, optimizer = METHODS[config.method]
    dtype = config.model.dtype if config.model.dtype != "auto" else ("bfloat16" if bf16 else "float32")
    train, lowrank = config.train, config.lowrank
    stepping = train.stepping
    if stepping == "auto":
        stepping = "deferred" if train.grad_accumulation > 1 or train.clip_grad_norm > 0 else "fused"
    return config.model_copy(
        update={
            "device": device,
            "model": config.model.model_copy(update={"dtype": dtype}),
            "train": train.model_copy(update={"stepping": stepping, "optimizer": train.optimizer or optimizer}),
            "lowrank": lowrank.model_copy(
                update={
                    "weight_format": lowrank.weight_format or weight_format,
                    "basis_format": lowrank.basis_format or basis_format or ("bf16" if dtype == "bfloat16" else "fp32"),
                    "max_gap": lowrank.max_gap or 16 * lowrank.update_proj_gap,
                    # a product of bf16 matrices arrives rounded to bf16; only a sum of several deserves fp32
                    "grad_dtype": lowrank.grad_dtype
                    or ("bfloat16" if dtype == "bfloat16" and train.grad_accumulation == 1 else "float32"),
                }
            ),
        }
    )


def _without_effect(config: Config) -> list[tuple[str, bool, str]]:
    """(key, whether it was set though another key switches it off, why it has no effect)."""
    low, data, train = config.lowrank, config.data, config.train
    basis = low.model_fields_set & {"proj_type", "update_proj_gap", "cos_threshold", "projector", "basis_format"}
    converted, weight_format = METHODS[config.method][:2]
    dense = (low.weight_format or weight_format) == "none"
    return [
        (", ".join(f"lowrank.{n}" for n in sorted(basis)), low.rank == "full" and bool(basis), "with rank: full"),
        ("lowrank.group_size", dense and converted and "group_size" in low.model_fields_set, "without int8 weights"),
        (
            "train.min_lr_ratio",
            train.lr_schedule == "constant" and "min_lr_ratio" in train.model_fields_set,
            "with lr_schedule: constant",
        ),
        (
            "data.vocab_size",
            "vocab_size" in data.model_fields_set and data.tokenizer is not None,
            "with data.tokenizer",
        ),
        (
            "data.valid_fraction",
            "valid_fraction" in data.model_fields_set and data.valid is not None,
            "with data.valid",
        ),
    ]


def remarks(config: Config) -> list[str]:
    """What a configuration says that its user may not expect: keys without effect, a warm-up that never ends."""
    found = []
    if not METHODS[config.method][0] and (unused := sorted(config.lowrank.model_fields_set)):
        found.append(f"method {config.method} ignores " + ", ".join(f"lowrank.{name}" for name in unused))
    train = config.train
    for key, given, why in _without_effect(config):
        if given:
            found.append(f"{key} has no effect {why}")
    if train.warmup_steps >= train.max_steps:
        found.append(f"train.warmup_steps ({train.warmup_steps}) ≥ train.max_steps: the full train.lr is never reached")
    return found


# Keys that a resumed run may change; everything else decides what the weights become.
RESUMABLE = (
    "run.name", "run.dir", "train.max_steps", "train.eval_every", "train.eval_batches", "train.save_every",
    "train.keep_last", "train.keep_every", "train.activation_checkpointing", "memory.budget", "data.cache_dir",
    "export.formats", "sample.prompt", "sample.max_new_tokens",
)  # fmt: skip


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        nested = _flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {prefix + name: value}
        flat |= nested
    return flat


def differences(saved: dict[str, Any], config: Config) -> list[str]:
    """``key: saved value → value now`` for every key that differs and that a resumed run may not change."""
    old, new = _flat(saved), _flat(config.model_dump(mode="json"))
    changed = [key for key in sorted({*old, *new} - set(RESUMABLE)) if old.get(key) != new.get(key)]
    return [f"{key}: {old.get(key)!r} → {new.get(key)!r}" for key in changed]


def dump(config: Config) -> str:
    """The configuration as YAML that :func:`load` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
