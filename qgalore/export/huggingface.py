"""Export as an ordinary Hugging Face folder: dense safetensors, config, tokenizer."""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..lowrank.linear import LowRankLinear


def other_tensors(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every stored tensor that is not a low-rank layer's weight or basis, once each (tied weights under their first
    name), floating-point ones in ``dtype``; biases of low-rank layers included."""
    owned = {n: m for n, m in model.named_modules() if isinstance(m, LowRankLinear)}
    state, seen = {}, set()
    for name, value in model.state_dict().items():
        parent = next((n for n in owned if name.startswith(f"{n}.")), None)
        if (parent is not None and name != f"{parent}.bias") or value.data_ptr() in seen:
            continue
        seen.add(value.data_ptr())
        state[name] = (value.to(dtype) if value.is_floating_point() else value).contiguous().cpu()
    return state


def dense_state(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """The model's tensors under their original names and layouts, floating-point ones in ``dtype``, on the CPU.

    Int8 weights are dequantized in fp32 and rounded once to ``dtype``.
    """
    state = other_tensors(model, dtype)
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear):
            weight = module.dense_weight().to(dtype)
            state[f"{name}.weight"] = (weight.T if module.transposed else weight).contiguous().cpu()
    return state


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write ``folder`` so that ``model``'s own class, its ``AutoModelFor…`` and ``AutoTokenizer`` load it."""
    with torch.device("meta"):
        skeleton = type(model)._from_config(model.config, dtype=dtype)
    skeleton.tie_weights()
    if skeleton.can_generate():
        skeleton.generation_config = model.generation_config
    folder.mkdir(parents=True, exist_ok=True)
    skeleton.save_pretrained(folder, state_dict=dense_state(model, dtype))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
