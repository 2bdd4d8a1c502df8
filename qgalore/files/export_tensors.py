"""What an export writes of a converted model: each tensor under its Hugging Face name, made when its turn comes."""

from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ..lowrank.layers.conv import LowRankConv
from ..lowrank.layers.experts import NAMES, Experts
from ..lowrank.layers.linear import LowRankLinear
from .safetensors import Deferred

Entries = dict[str, Deferred]


def other_tensors(model: nn.Module, dtype: torch.dtype) -> Entries:
    """Every stored tensor that is not a low-rank layer's weight or basis, once each (tied weights under their first
    name), floating-point ones in ``dtype``; biases of low-rank layers included."""
    layers = ((n, m) for n, m in model.named_modules() if isinstance(m, LowRankLinear))
    owned = {f"{name}.{key}" for name, module in layers for key in module.state_dict() if key != "bias"}
    entries: Entries = {}
    seen: set[int] = set()
    for name, value in model.state_dict().items():
        if name in owned or (value.numel() and value.data_ptr() in seen):
            continue
        seen.add(value.data_ptr())
        target = dtype if value.is_floating_point() else value.dtype
        entries[name] = Deferred(target, tuple(value.shape), partial(_cast, value, target))
    return entries


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.detach().to(dtype).contiguous()


def weight_of(layer: LowRankLinear, dtype: torch.dtype) -> Tensor:
    """A layer's weight, dequantized in fp32 and rounded once to ``dtype``, in the layout of the layer it replaced."""
    weight = layer.dense_weight().to(dtype)
    weight = weight.view(layer.kernel_shape) if isinstance(layer, LowRankConv) else weight
    return (weight.T if layer.transposed else weight).contiguous()


def dense_tensors(model: nn.Module, dtype: torch.dtype) -> Entries:
    """The model's tensors under their names and in their shapes before conversion, floating-point ones in ``dtype``; a
    mixture's experts are stacked again."""
    entries = other_tensors(model, dtype)
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            inside |= set(module.modules())
            for key in NAMES:
                first = getattr(module, key)[0]
                shape = (len(getattr(module, key)), first.out_features, first.in_features)
                entries[f"{name}.{key}"] = Deferred(dtype, shape, partial(module.stacked, key, dtype))
        elif isinstance(module, LowRankLinear) and module not in inside:
            shape = module.kernel_shape if isinstance(module, LowRankConv) else tuple(module.weight.shape)
            shape = shape[::-1] if module.transposed else shape
            entries[f"{name}.weight"] = Deferred(dtype, tuple(shape), partial(weight_of, module, dtype))
    return entries


def hub_tensors(model: nn.Module, skeleton: PreTrainedModel, dtype: torch.dtype) -> Entries:
    """:func:`dense_tensors` under the names and in the shapes that the hub's files have, as ``save_pretrained`` of
    ``skeleton``, the unconverted model on the meta device, writes them."""
    entries = dense_tensors(model, dtype)
    ignored = set(getattr(skeleton, "_keys_to_ignore_on_save", None) or ())
    entries = {name: value for name, value in entries.items() if name not in ignored}
    groups: dict[str, Entries] = {}
    for name, value in entries.items():
        place, _, key = name.rpartition(".")
        groups.setdefault(place if key in NAMES else name, {})[name] = value
    renamed: Entries = {}
    for group in groups.values():
        blank = {n: torch.empty(d.shape, dtype=d.dtype, device="meta") for n, d in group.items()}
        for name, value in revert_weight_conversion(skeleton, blank).items():
            make = partial(_reverted, skeleton, group, name)
            renamed[name] = Deferred(value.dtype, tuple(value.shape), make)
    return renamed


def _reverted(skeleton: PreTrainedModel, group: Entries, name: str) -> Tensor:
    """One tensor of the hub's layout, made of the tensors of ``group``."""
    return revert_weight_conversion(skeleton, {n: d.make().cpu() for n, d in group.items()})[name].contiguous()
