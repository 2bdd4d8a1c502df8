"""Model shapes by name: the papers' LLaMAs (GaLore, arXiv 2403.03507, table 5 and code), a small one, and the 7 to 70
billion parameter models that people continue, as their published config.json files state them.

A preset without ``vocab_size`` takes it from the tokenizer.
"""

_COMMON = {
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
}


def _llama(hidden: int, intermediate: int, layers: int, heads: int, **changes) -> dict:
    shape = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    return {**_COMMON, **shape, "num_attention_heads": heads, **changes}


def _named(model_type: str, vocab: int, kv_heads: int, positions: int, theta: float, shape: dict, **changes) -> dict:
    """A published model: grouped-query attention, a vocabulary and positions of its own."""
    rope = {"rope_type": "default", "rope_theta": theta}
    own = {"vocab_size": vocab, "num_key_value_heads": kv_heads, "max_position_embeddings": positions}
    return {**shape, "model_type": model_type, **own, "rope_parameters": rope, **changes}


def _experts(model_type: str, **changes) -> dict:
    """A small mixture of 8 experts, 2 for a token, in layers of the quickstart's width."""
    shape = _llama(256, 704, 3, 4, num_key_value_heads=2, tie_word_embeddings=True, num_local_experts=8)
    return {**shape, "model_type": model_type, "num_experts_per_tok": 2, "output_router_logits": True, **changes}


PRESETS = {
    "llama_quickstart": _llama(256, 704, 5, 4, tie_word_embeddings=True),
    "mixtral_quickstart": _experts("mixtral", intermediate_size=352),
    "qwen3_moe_quickstart": _experts("qwen3_moe", moe_intermediate_size=176, head_dim=64),
    "llama_60m": _llama(512, 1376, 8, 8),
    "llama_130m": _llama(768, 2048, 12, 12),
    "llama_350m": _llama(1024, 2736, 24, 16),
    "llama_1b": _llama(2048, 5461, 24, 32),
    "llama_7b": _llama(4096, 11008, 32, 32),
    "llama_13b": _llama(5120, 13824, 40, 40),
    "llama3_8b": _named("llama", 128256, 8, 8192, 5e5, _llama(4096, 14336, 32, 32), rms_norm_eps=1e-5),
    "mistral_7b": _named(
        "mistral", 32768, 8, 32768, 1e6, _llama(4096, 14336, 32, 32), rms_norm_eps=1e-5, sliding_window=None
    ),
    "llama2_70b": _named("llama", 32000, 8, 4096, 1e4, _llama(8192, 28672, 80, 64), rms_norm_eps=1e-5),
    "qwen3_14b": _named("qwen3", 151936, 8, 40960, 1e6, _llama(5120, 17408, 40, 40), head_dim=128),
    "qwen3_32b": _named("qwen3", 151936, 8, 40960, 1e6, _llama(5120, 25600, 64, 64), head_dim=128),
    "qwen2.5_7b": _named("qwen2", 152064, 4, 32768, 1e6, _llama(3584, 18944, 28, 28)),
}
