"""Export as an ordinary Hugging Face folder: dense safetensors, config, tokenizer."""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..lowrank.layers.conv import LowRankConv
from ..lowrank.layers.experts import NAMES, Experts
from ..lowrank.layers.linear import LowRankLinear


def other_tensors(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every stored tensor that is not a low-rank layer's weight or basis, once each (tied weights under their first
    name), floating-point ones in ``dtype``; biases of low-rank layers included."""
    layers = ((n, m) for n, m in model.named_modules() if isinstance(m, LowRankLinear))
    owned = {f"{name}.{key}" for name, module in layers for key in module.state_dict() if key != "bias"}
    state, seen = {}, set()
    for name, value in model.state_dict().items():
        if name in owned or value.data_ptr() in seen:
            continue
        seen.add(value.data_ptr())
        state[name] = (value.to(dtype) if value.is_floating_point() else value).contiguous().cpu()
    return state


def dense_state(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """The model's tensors under their original names and layouts, floating-point ones in ``dtype``, on the CPU.

    Int8 weights are dequantized in fp32 and rounded once to ``dtype``; a mixture's experts are stacked again.
    """
    state = other_tensors(model, dtype)
    inside = set()
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            inside |= set(module.modules())
            state |= {f"{name}.{key}": module.stacked(key, dtype) for key in NAMES}
        elif isinstance(module, LowRankLinear) and module not in inside:
            weight = module.dense_weight().to(dtype)
            weight = weight.view(module.kernel_shape) if isinstance(module, LowRankConv) else weight
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
