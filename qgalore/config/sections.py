"""A configuration: its keys at the top, the short sections, and what each method means."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from .data_section import DataSection
from .lowrank_section import LowRankSection
from .mesh import Mesh
from .schema import SIDE, Once, Section, key
from .train_section import TrainSection


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
    elementwise: Literal["auto", "liger", "plain"] = key(
        "auto", "What computes RMSNorm, SwiGLU and rotary embeddings. With `auto` it is Liger's kernels on a GPU if "
        "liger-kernel is installed, wherever a trial at the start finds them right. With `liger` the run is refused "
        "without them.",
    )  # fmt: skip
    compile: Literal["none", "blocks"] = key(
        "none", "With `blocks`, torch.compile makes each transformer block faster."
    )


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
    formats: Annotated[list[Literal["hf", "int8", "gguf"]], Once] = key(
        ["hf"],
        "What to write after training. `hf` is for transformers, `int8` for vLLM and `gguf` for llama.cpp.",
        example=["hf", "gguf"],
    )
    which: Literal["last", "best"] = key(
        "last", "Whether to export the last weights, or the best, which train.keep_best kept."
    )


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
    tracking: Annotated[list[Literal["tensorboard", "wandb", "trackio"]], Once] = key(
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
