"""LLaMA shapes by name: the papers' sizes (GaLore, arXiv 2403.03507, table 5 and code) and a small one.

``vocab_size`` is not here: a preset takes it from the tokenizer.
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


PRESETS = {
    "llama_quickstart": _llama(256, 704, 5, 4, tie_word_embeddings=True),
    "llama_60m": _llama(512, 1376, 8, 8),
    "llama_130m": _llama(768, 2048, 12, 12),
    "llama_350m": _llama(1024, 2736, 24, 16),
    "llama_1b": _llama(2048, 5461, 24, 32),
    "llama_7b": _llama(4096, 11008, 32, 32),
}
