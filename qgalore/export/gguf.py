"""Export for llama.cpp: GGUF with Q8_0 blocks made of the trainer's own integers, not quantized again from floats.

A Q8_0 block is 32 int8 values and one fp16 scale. Our groups are multiples of 32 wherever 32 divides the width, and
every bf16 scale in [2⁻¹⁷, 65280] is exact in fp16, so q and scale survive; a layer whose width 32 does not divide is
written in bf16, and said. Embeddings and head are bf16 unless they are int8 too, vectors fp32.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ..errors import ConfigError
from ..lowrank.layers.linear import LowRankLinear
from .huggingface import other_tensors

BLOCK = 32
ARCHITECTURES = ("llama", "mistral")


def _library():
    try:
        import gguf
    except ImportError as error:
        raise ConfigError("the GGUF export needs the package gguf: pip install gguf") from error
    return gguf


def rope_order(heads: int, rows: int) -> Tensor:
    """Row order that llama.cpp's llama graph wants of query and key weights: it rotates adjacent pairs where
    transformers rotates the first half of a head against the second."""
    return torch.arange(rows).view(heads, 2, rows // heads // 2).transpose(1, 2).reshape(-1)


def q8_0(q: Tensor, scale: Tensor) -> np.ndarray:
    """uint8 (out, in/32 · 34): the blocks of an int8 weight (out, in) with bf16 scales (out, groups)."""
    rows, width = q.shape
    blocks = width // BLOCK
    scales = scale.repeat_interleave(blocks // scale.shape[1], dim=1).to(torch.float16)
    parts = (scales.view(rows, blocks, 1).view(torch.uint8), q.reshape(rows, blocks, BLOCK).view(torch.uint8))
    return torch.cat(parts, dim=2).view(rows, -1).cpu().numpy()


def _byte_level_bpe(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The tokenizer's own description, if it is the byte-level BPE that GPT-2's pre-tokenizer describes."""
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    splitter = description.get("pre_tokenizer") or {}
    plain = splitter.get("type") == "ByteLevel" and splitter.get("use_regex", True)
    if description["model"]["type"] != "BPE" or not plain or splitter.get("add_prefix_space"):
        raise ConfigError(
            f"the GGUF export knows GPT-2's byte-level BPE tokenizers, and this is {description['model']['type']} with "
            f"the pre-tokenizer {splitter.get('type')}; use --format hf and convert that with llama.cpp's own script"
        )
    return description


def _write_tokenizer(writer, tokenizer: PreTrainedTokenizerBase, vocab: int) -> None:
    gguf = _library()
    description = _byte_level_bpe(tokenizer)
    special = {entry["id"] for entry in description["added_tokens"] if entry["special"]}
    tokens, kinds = [], []
    for index in range(vocab):
        known = index < len(tokenizer)
        tokens.append(tokenizer.convert_ids_to_tokens(index) if known else f"[PAD{index}]")
        kind = gguf.TokenType.CONTROL if index in special else gguf.TokenType.NORMAL
        kinds.append(kind if known else gguf.TokenType.UNUSED)
    merges = [m if isinstance(m, str) else " ".join(m) for m in description["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(False)


def _write_shape(writer, config: PretrainedConfig) -> None:
    gguf = _library()
    heads = config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_rope_dimension_count(width)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)


def check(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise :class:`ConfigError` for an architecture or a tokenizer that the export does not know, or if the package
    gguf is missing."""
    _library()
    _byte_level_bpe(tokenizer)
    config = model.config
    if config.model_type not in ARCHITECTURES:
        raise ConfigError(
            f"the GGUF export knows {' and '.join(ARCHITECTURES)}, not {config.model_type}; use --format hf and "
            "convert that with llama.cpp's own script"
        )
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise ConfigError(f"the GGUF export does not know rope_type {rope['rope_type']!r}; export with --format hf")


def _tensors(model: nn.Module, report: Callable[[str], None]) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Hugging Face name → (values, scale or None), query and key rows in llama.cpp's order."""
    config = model.config
    entries: dict[str, tuple[Tensor, Tensor | None]] = {}
    for name, value in other_tensors(model, torch.float32).items():
        entries[name] = (value, None)
    for name, layer in ((n, m) for n, m in model.named_modules() if isinstance(m, LowRankLinear)):
        if layer.weight_scale is None or layer.in_features % BLOCK:
            if layer.weight_scale is not None:
                report(f"GGUF export: {name}: in_features {layer.in_features} is no multiple of 32: bf16")
            entries[f"{name}.weight"] = (layer.dense_weight(), None)
        else:
            entries[f"{name}.weight"] = (layer.weight.detach(), layer.weight_scale)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, (values, scale) in entries.items():
        part = name.split(".")[-2]
        if part in heads:
            order = rope_order(heads[part], values.shape[0]).to(values.device)
            entries[name] = (values[order], None if scale is None else scale[order])
    return entries


def save(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, report: Callable[[str], None] = print
) -> None:
    """Write ``folder/model.gguf``, tokenizer included. Raises :class:`ConfigError` for an architecture or a tokenizer
    that it does not know, or if the package gguf is missing."""
    gguf = _library()
    check(model, tokenizer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    folder.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    _write_shape(writer, model.config)
    _write_tokenizer(writer, tokenizer, model.config.vocab_size)
    for name, (values, scale) in _tensors(model, report).items():
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise ConfigError(f"GGUF has no name for {name}; export with --format hf")
        if scale is not None:
            writer.add_tensor(target, q8_0(values, scale), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        elif values.ndim > 1:
            raw = values.to(torch.bfloat16).contiguous().view(torch.uint8).cpu().numpy()
            writer.add_tensor(target, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(target, values.cpu().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
