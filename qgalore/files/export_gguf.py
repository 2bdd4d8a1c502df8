"""Export for llama.cpp: GGUF with Q8_0 blocks made of the trainer's own integers, not quantized again from floats.

A Q8_0 block is 32 int8 values and one fp16 scale. Our groups are multiples of 32 wherever 32 divides the width, and
every bf16 scale in [2⁻¹⁷, 65280] is exact in fp16, so q and scale survive; a layer whose width 32 does not divide is
written in bf16, and said. Embeddings and head are bf16 unless they are int8 too, vectors fp32.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.checksums import sync
from ..errors import ConfigError
from ..lowrank.layers.linear import LowRankLinear
from . import atomic, gguf_shapes, gguf_tokens
from .export_tensors import other_tensors
from .gguf_shapes import Keys, rope_order
from .gguf_tokens import Tokens
from .safetensors import Deferred

READERS = "llama.cpp and what is built on it"
BLOCK, BLOCK_BYTES = 32, 34
_BESIDE = 16 << 20  # bytes of the file that are not tensors, at most about


def _library():
    try:
        import gguf
    except ImportError as error:
        raise ConfigError("the GGUF export needs the package gguf: pip install gguf") from error
    return gguf


def q8_0(q: Tensor, scale: Tensor) -> np.ndarray:
    """uint8 (out, in/32 · 34): the blocks of an int8 weight (out, in) with bf16 scales (out, groups)."""
    rows, width = q.shape
    blocks = width // BLOCK
    scales = scale.repeat_interleave(blocks // scale.shape[1], dim=1).to(torch.float16)
    parts = (scales.view(rows, blocks, 1).view(torch.uint8), q.reshape(rows, blocks, BLOCK).view(torch.uint8))
    return torch.cat(parts, dim=2).view(rows, -1).cpu().numpy()


@dataclass(frozen=True)
class _Entry:
    """One tensor of the file: the shape and dtype of its bytes as numpy has them, and ``make``, which gives them."""

    name: str
    shape: tuple[int, ...]
    dtype: Any
    kind: Any  # gguf.GGMLQuantizationType
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


def check(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[Keys, Tokens]:
    """What the file says besides its tensors. Raises :class:`ConfigError` for what the export does not know."""
    _library()
    keys = gguf_shapes.describe(model.config)
    return keys, gguf_tokens.describe(tokenizer, model.config.vocab_size, _ends(model))


def _ends(model: PreTrainedModel) -> list[int]:
    """The ids that end what the model says."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        return []
    return [ends] if isinstance(ends, int) else list(ends)


def _entries(model: PreTrainedModel, keys: Keys, report: Callable[[str], None]) -> Iterator[_Entry]:
    gguf = _library()
    config, shape = model.config, keys.shape
    architecture = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[shape.name]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    rows_of = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads} if shape.rotated else {}
    stored: dict[str, LowRankLinear | Deferred] = dict(other_tensors(model, torch.float32))
    stored |= {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, LowRankLinear)}
    for name, value in stored.items():
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise ConfigError(f"GGUF has no name for {name}; {gguf_shapes.REMEDY}")
        heads = rows_of.get(name.split(".")[-2])
        rows = value.out_features if isinstance(value, LowRankLinear) else value.shape[0]
        order = None if heads is None else rope_order(heads, rows)
        if isinstance(value, LowRankLinear):
            yield _of_layer(target, name.removesuffix(".weight"), value, order, report)
        else:
            yield _of_values(target, value, order, shape.norms if name.endswith("norm.weight") else 0.0)
    for name, value in keys.extra.items():
        yield _of_values(name, Deferred(value.dtype, tuple(value.shape), lambda value=value: value), None, 0.0)


def _of_layer(
    target: str, name: str, layer: LowRankLinear, order: Tensor | None, report: Callable[[str], None]
) -> _Entry:
    rows, width = layer.weight.shape
    if layer.weight_scale is None or width % BLOCK:
        if layer.weight_scale is not None:
            report(f"GGUF export: {name}: in_features {width} is no multiple of 32: bf16")
        return _of_values(target, Deferred(torch.float32, (rows, width), layer.dense_weight), order, 0.0)
    kind = _library().GGMLQuantizationType.Q8_0
    return _Entry(target, (rows, width // BLOCK * BLOCK_BYTES), np.uint8, kind, partial(_blocks, layer, order))


def _blocks(layer: LowRankLinear, order: Tensor | None) -> np.ndarray:
    q, scale = layer.weight.detach(), layer.weight_scale
    assert scale is not None, "only int8 weights have blocks"
    if order is not None:
        order = order.to(q.device)
        q, scale = q[order], scale[order]
    return q8_0(q, scale)


def _of_values(target: str, value: Deferred, order: Tensor | None, plus: float) -> _Entry:
    kinds = _library().GGMLQuantizationType
    matrix = len(value.shape) > 1
    shape = (*value.shape[:-1], value.shape[-1] * 2) if matrix else tuple(value.shape)
    make = partial(_values, value, order, plus)
    return _Entry(target, shape, np.uint8 if matrix else np.float32, kinds.BF16 if matrix else kinds.F32, make)


def _values(value: Deferred, order: Tensor | None, plus: float) -> np.ndarray:
    made = value.make()
    made = made if order is None else made[order.to(made.device)]
    if made.ndim > 1:
        return made.to(torch.bfloat16).contiguous().view(torch.uint8).cpu().numpy()
    return (made.to(torch.float32) + plus).cpu().numpy()


def save(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, report: Callable[[str], None] = print
) -> None:
    """Write ``folder/model.gguf``, tokenizer included, a tensor at a time. Raises as :func:`check`, and ``OSError``."""
    gguf = _library()
    keys, tokens = check(model, tokenizer)
    for note in dict.fromkeys([*keys.notes, *tokens.notes]):
        report(note)
    entries = list(_entries(model, keys, report))
    folder.mkdir(parents=True, exist_ok=True)
    atomic.need_room(_BESIDE + sum(entry.nbytes for entry in entries), folder)
    path = folder / "model.gguf"
    writer = gguf.GGUFWriter(path, keys.shape.name)
    try:
        for call, value in keys.calls:
            getattr(writer, call)(value)
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
        gguf_tokens.write(writer, tokens, tokenizer)
        for entry in entries:
            writer.add_tensor_info(entry.name, entry.shape, np.dtype(entry.dtype), entry.nbytes, entry.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            writer.write_tensor_data(entry.make())
    finally:
        writer.close()
    sync(path)
