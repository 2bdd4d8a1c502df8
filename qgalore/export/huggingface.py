"""Export as an ordinary Hugging Face folder: dense safetensors, config, tokenizer."""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..lowrank.linear import LowRankLinear


def dense_state(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """The model's tensors under their original names and layouts, floating-point ones in ``dtype``, on the CPU.

    Int8 weights are dequantized in fp32 and rounded once to ``dtype``.
    """
    state = {}
    owned = set()
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear):
            weight = module.dense_weight().to(dtype)
            state[f"{name}.weight"] = (weight.T if module.transposed else weight).contiguous().cpu()
            if module.bias is not None:
                state[f"{name}.bias"] = module.bias.detach().to(dtype).cpu()
            owned.add(f"{name}.")
    for name, value in model.state_dict().items():
        if not name.startswith(tuple(owned)):
            state[name] = (value.to(dtype) if value.is_floating_point() else value).contiguous().cpu()
    return state


def save(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write ``folder`` so that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load it."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(model.config, dtype=dtype)
    skeleton.tie_weights()
    skeleton.generation_config = model.generation_config
    state = dense_state(model, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    skeleton.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)
