"""The architectures that the GGUF export knows: what llama.cpp computes for each, and how its tensors differ.

llama.cpp computes a graph that it knows by the architecture's name. Whatever a Hugging Face config changes in that
graph must either be a key of the file or be refused here. The keys and the changes of tensors follow llama.cpp's own
conversion script.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ..errors import ConfigError

SILU, GELU = ("silu", "swish"), ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
REMEDY = "export with --format hf (export.formats: [hf])"


@dataclass(frozen=True)
class Shape:
    """One architecture of llama.cpp. ``rotated``: query and key rows change places (see :func:`rope_order`);
    ``norms``: what is added to the weights of its norms; ``ropes``: the rope types that can be written; ``biases``:
    the config's keys that may be true."""

    name: str
    activations: tuple[str, ...] = SILU
    rotated: bool = False
    norms: float = 0.0
    ropes: tuple[str, ...] = ("default", "linear")
    biases: tuple[str, ...] = ()
    must_tie: bool = False


SHAPES = {
    "llama": Shape("llama", rotated=True, ropes=("default", "linear", "llama3"), biases=("attention_bias", "mlp_bias")),
    "mistral": Shape("llama", rotated=True),
    "qwen2": Shape("qwen2"),
    "qwen3": Shape("qwen3"),
    "gemma": Shape("gemma", GELU, norms=1.0, ropes=("default",), must_tie=True),
    "gemma2": Shape("gemma2", GELU, norms=1.0, ropes=("default",), must_tie=True),
    "gemma3_text": Shape("gemma3", GELU, norms=1.0),
    "phi3": Shape("phi3", ropes=("default", "longrope")),
}


@dataclass
class Keys:
    """What the file says of the shape: ``calls`` are methods of gguf's writer with their argument; ``extra`` tensors
    that no module owns; ``notes`` lines to print."""

    shape: Shape
    calls: list[tuple[str, Any]] = field(default_factory=list)
    extra: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def rope_order(heads: int, rows: int) -> Tensor:
    """Row order that llama.cpp's llama graph wants of query and key weights: it rotates adjacent pairs where
    transformers rotates the first half of a head against the second."""
    return torch.arange(rows, device="cpu").view(heads, 2, rows // heads // 2).transpose(1, 2).reshape(-1)


def describe(config: PretrainedConfig) -> Keys:
    """The keys for a model of ``config``. Raises :class:`ConfigError` for what llama.cpp does not know or computes
    otherwise."""
    shape = SHAPES.get(config.model_type)
    if shape is None:
        raise ConfigError(f"the GGUF export knows {', '.join(SHAPES)}, not {config.model_type}; {REMEDY}")
    _check_fields(config, shape)
    keys = Keys(shape)
    heads, width = config.num_attention_heads, head_width(config)
    keys.calls = [
        ("add_embedding_length", config.hidden_size),
        ("add_block_count", config.num_hidden_layers),
        ("add_feed_forward_length", config.intermediate_size),
        ("add_head_count", heads),
        ("add_head_count_kv", getattr(config, "num_key_value_heads", None) or heads),
        ("add_key_length", width),
        ("add_value_length", width),
        ("add_layer_norm_rms_eps", config.rms_norm_eps),
        ("add_vocab_size", config.vocab_size),
    ]
    _windows(config, keys)
    _rotations(config, keys)
    return keys


def head_width(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _refuse(config: PretrainedConfig, key: str, value: object, rule: str) -> None:
    raise ConfigError(
        f"{key} is {value!r} in this model's config, and llama.cpp's {config.model_type} {rule}; {REMEDY}"
    )


def _check_fields(config: PretrainedConfig, shape: Shape) -> None:
    for key in ("hidden_act", "hidden_activation"):
        value = getattr(config, key, None)
        if value is not None and value not in shape.activations:
            _refuse(config, key, value, f"computes {shape.activations[0]}")
    for key in ("attention_bias", "mlp_bias", "use_sliding_window", "use_bidirectional_attention"):
        if getattr(config, key, None) and key not in shape.biases:
            _refuse(config, key, True, "has no place for it")
    if shape.must_tie and not config.tie_word_embeddings:
        _refuse(config, "tie_word_embeddings", False, "has one tensor for embedding and head")
    if config.model_type == "gemma3_text":
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            if getattr(config, key, None) is not None:
                _refuse(config, key, getattr(config, key), "does not cap logits")
    scale = getattr(config, "query_pre_attn_scalar", None)
    largest = {"gemma2": 46, "gemma3_text": 62}.get(config.model_type)  # the 27B models, known by their layers
    wanted = config.hidden_size / config.num_attention_heads
    wanted = wanted if config.num_hidden_layers == largest else head_width(config)
    if scale is not None and scale != wanted:
        _refuse(config, "query_pre_attn_scalar", scale, f"divides by the root of {wanted:g} here")


def _windows(config: PretrainedConfig, keys: Keys) -> None:
    longest, window = config.max_position_embeddings, getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or []
    if config.model_type in ("gemma2", "gemma3_text"):
        period = 2 if config.model_type == "gemma2" else 6
        pattern = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(len(kinds))]
        if kinds and kinds != pattern:
            _refuse(config, "layer_types", kinds, f"attends to everything in every layer {period} only")
        # transformers counts the token itself, as llama.cpp does.
        keys.calls.append(("add_sliding_window", window))
    elif "sliding_attention" in kinds:
        _refuse(config, "layer_types", kinds, "attends to everything in every layer")
    elif window is not None and config.model_type in ("mistral", "phi3"):
        if window < longest:
            keys.notes.append(f"GGUF export: llama.cpp knows no sliding window here; context {window} of {longest}")
        longest = min(longest, window)
    keys.calls.append(("add_context_length", longest))
    if config.model_type == "gemma2":
        for key, call in (("attn", "add_attn_logit_softcapping"), ("final", "add_final_logit_softcapping")):
            cap = getattr(config, f"{key}_logit_softcapping")
            # llama.cpp always caps in gemma2; a cap this high changes no logit.
            keys.calls.append((call, 1e6 if cap is None else cap))


def _rotations(config: PretrainedConfig, keys: Keys) -> None:
    rope = dict(config.rope_parameters)
    if "full_attention" in rope:
        local, rope = rope["sliding_attention"] or {}, dict(rope["full_attention"])
        if local.get("rope_type", "default") != "default":
            _refuse(config, "rope_parameters.sliding_attention", local, "rotates these layers without scaling")
        if local.get("rope_theta", 10000.0) != 10000.0:
            _refuse(config, "rope_parameters.sliding_attention", local, "has base 10000 in these layers")
    kind = rope.get("rope_type", "default")
    if kind not in keys.shape.ropes:
        _refuse(config, "rope_type", kind, f"is exported with {', '.join(keys.shape.ropes)} only")
    width, part = head_width(config), rope.get("partial_rotary_factor", 1.0)
    if part != 1.0 and config.model_type != "phi3":
        _refuse(config, "partial_rotary_factor", part, "rotates whole heads")
    keys.calls += [("add_rope_dimension_count", int(width * part)), ("add_rope_freq_base", rope["rope_theta"])]
    _SCALINGS.get(kind, lambda *_: None)(config, rope, keys)


def _linear(config: PretrainedConfig, rope: dict[str, Any], keys: Keys) -> None:
    from gguf import RopeScalingType

    keys.calls += [("add_rope_scaling_type", RopeScalingType.LINEAR), ("add_rope_scaling_factor", rope["factor"])]


def _llama3(config: PretrainedConfig, rope: dict[str, Any], keys: Keys) -> None:
    """Llama 3.1's scaling as llama.cpp takes it: what each frequency is divided by, as a tensor."""
    width, old = head_width(config), rope["original_max_position_embeddings"]
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    exponents = torch.arange(0, width, 2, dtype=torch.float64, device="cpu") / width
    turns = old * rope["rope_theta"] ** -exponents / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)  # 0: a wave longer than the old context; 1: a short one
    keys.extra["rope_freqs.weight"] = (1 / ((1 - smooth) / factor + smooth)).to(torch.float32)


def _longrope(config: PretrainedConfig, rope: dict[str, Any], keys: Keys) -> None:
    """Phi-3's two sets of factors, for contexts up to the original length and for longer ones."""
    old = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    attention = rope.get("attention_factor")
    if attention is None:
        factor = rope.get("factor") or config.max_position_embeddings / old
        attention = math.sqrt(1 + math.log(factor) / math.log(old)) if factor > 1 else 1.0
    keys.calls += [("add_rope_scaling_orig_ctx_len", old), ("add_rope_scaling_attn_factors", attention)]
    for name in ("long", "short"):
        factors = torch.tensor(rope[f"{name}_factor"], dtype=torch.float32, device="cpu")
        keys.extra[f"rope_factors_{name}.weight"] = factors


_SCALINGS: dict[str, Callable[[PretrainedConfig, dict[str, Any], Keys], None]] = {
    "linear": _linear,
    "llama3": _llama3,
    "longrope": _longrope,
}
