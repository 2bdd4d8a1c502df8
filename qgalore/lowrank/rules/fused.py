"""Weights that hold several matrices, one above another: query, key and value in one tensor, or gate and up.

Muon orthogonalises each of them by itself, as it does where a model stores them apart (docs/lab/muon.md measures it).
The layouts are those of transformers' code, architecture by architecture, because one name stands for several of them.
CodeGen and GPT-NeoX mix the rows of query, key and value, and their weights stay whole, like all that are not listed.
"""

from collections.abc import Callable
from typing import Any

Split = Callable[[int, Any], tuple[int, ...]]  # a weight's rows, a model's config → the rows of each of its matrices


def _by_heads(rows: int, config: Any) -> tuple[int, ...]:
    """Query, key and value, of which the latter two may have fewer heads."""
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    unit = rows // (heads + 2 * shared)
    return unit * heads, unit * shared, unit * shared


def _halves(rows: int, config: Any) -> tuple[int, ...]:
    return rows // 2, rows // 2


def _by_width(rows: int, config: Any) -> tuple[int, ...]:
    """Matrices as tall as the model is wide. GPT-2 has three in self-attention, and two in cross-attention."""
    return (config.hidden_size,) * (rows // config.hidden_size)


_EXPERTS = {"gate_up_proj": _halves}
LAYOUTS: dict[str, dict[str, Split]] = {
    "phi3": {"qkv_proj": _by_heads, "gate_up_proj": _halves},
    "glm": {"gate_up_proj": _halves},
    "glm4": {"gate_up_proj": _halves},
    "gpt2": {"c_attn": _by_width},
    "mixtral": _EXPERTS,
    "olmoe": _EXPERTS,
    "qwen2_moe": _EXPERTS,
    "qwen3_moe": _EXPERTS,
}


def rows_of_parts(name: str, rows: int, config: Any) -> tuple[int, ...]:
    """How many of a weight's ``rows`` each of its matrices has, in their order; all of them where it is one matrix.

    name: of its layer, dotted. An expert's ends in its number. config: of the whole model, or None.
    """
    leaf = next((part for part in reversed(name.split(".")) if not part.isdecimal()), "")
    split = LAYOUTS.get(getattr(config, "model_type", None) or "", {}).get(leaf)
    parts = (rows,) if split is None else split(rows, config)
    return parts if sum(parts) == rows else (rows,)
