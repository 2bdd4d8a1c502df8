"""The keys of projection and quantization."""

from typing import Annotated, Literal

from pydantic import Field

from .schema import SIDE, STEPS, Section, key

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
