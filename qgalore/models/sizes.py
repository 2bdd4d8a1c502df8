"""Sizes and numbers that a config.json may state. What no model has is refused by name before anything is built."""

import math
from typing import Any

from ..errors import ConfigError

# The greatest value of each size that any model is likely to have, some way above the largest known ones.
_WIDTH, _LAYERS, _COUNT, _ROWS, _HEAD = 1 << 18, 1 << 11, 1 << 14, 1 << 24, 1 << 14
_LIMITS = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "word_embed_proj_dim"), _WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), _LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads"), _COUNT),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "d_ff", "moe_intermediate_size"), 1 << 22),
    **dict.fromkeys(("head_dim", "d_kv", "rotary_dim", "v_head_dim"), _HEAD),
    **dict.fromkeys(("vocab_size", "type_vocab_size"), _ROWS),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length"), 1 << 28),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "num_experts_per_tok"), _COUNT),
}
_MAY_BE_ZERO = {"type_vocab_size", "num_local_experts", "num_experts", "n_routed_experts", "num_experts_per_tok"}
_POSITIVE = ("_eps", "_epsilon", "rope_theta", "rope_local_base_freq")
_LARGEST_EPS = 1.0  # more would leave nothing of what a norm normalises
_ROPE = {"factor", "attention_factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"}
_DROPOUT = ("dropout", "_pdrop", "dropout_prob", "layerdrop", "dropout_rate")
_REMEDY = "Give the value that the model was made with"


def check_fields(fields: dict[str, Any], where: str) -> None:
    """Raise :class:`ConfigError`, naming the field, for a size or constant of ``fields``, sections within them
    included, that no model has. ``where`` says where they are stated."""
    for name, value in fields.items():
        if not isinstance(name, str):  # of a table of labels
            continue
        if isinstance(value, dict):
            check_fields(value, f"{where}: {name}")
        elif name in _LIMITS:
            for one in value if isinstance(value, list) else [value]:
                _check_size(name, one, where)
        elif isinstance(value, float) and math.isnan(value):
            raise ConfigError(f"{where}: {name} is not a number (NaN). {_REMEDY}")
        elif (name.endswith(_POSITIVE) or name in _ROPE) and value is not None:
            if not _number(value) or not 0 < value < math.inf:
                raise ConfigError(f"{where}: {name} is {value!r}; it must be a number above zero. {_REMEDY}")
            if name.endswith(("_eps", "_epsilon")) and value >= _LARGEST_EPS:
                raise ConfigError(f"{where}: {name} is {value!r}; it must be below {_LARGEST_EPS:g}. {_REMEDY}")
        elif name.endswith(_DROPOUT) and value is not None and (not _number(value) or not 0 <= value < 1):
            raise ConfigError(f"{where}: {name} is {value!r}; it must be a share, from 0 to below 1. {_REMEDY}")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_size(name: str, value: Any, where: str) -> None:
    if value is None:
        return
    least = 0 if name in _MAY_BE_ZERO else 1
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{where}: {name} is {value!r}; it must be a whole number. {_REMEDY}")
    if value < least:
        raise ConfigError(f"{where}: {name} is {value}; it must be at least {least}. {_REMEDY}")
    if value > _LIMITS[name]:
        raise ConfigError(f"{where}: {name} is {value:,}, more than any model has ({_LIMITS[name]:,}). {_REMEDY}")


def check_ids(fields: dict[str, Any], where: str) -> list[str]:
    """Notes about the ids of special tokens that the vocabulary does not have. Raises :class:`ConfigError` for a
    padding token beyond it, with which PyTorch builds no embedding."""
    vocab, notes = fields.get("vocab_size"), []
    if not isinstance(vocab, int):
        return notes
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        given = fields.get(name)
        for value in given if isinstance(given, list) else [given]:
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise ConfigError(f"{where}: {name} is {value!r}; it must be a whole number or null")
            if name == "pad_token_id" and not -vocab <= value < vocab:
                raise ConfigError(
                    f"{where}: pad_token_id is {value}, and the vocabulary has ids 0 to {vocab - 1}. "
                    "Set it to null or to one of these"
                )
            if not 0 <= value < vocab:
                notes.append(f"{where}: {name} {value} is no id of the vocabulary (0 to {vocab - 1})")
    return notes
