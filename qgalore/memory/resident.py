"""What a run keeps between steps, byte by byte, from a converted model on the meta device."""

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..lowrank.layers.bases import Basis
from ..lowrank.layers.linear import LowRankLinear
from ..lowrank.tensors.base import TrainedTensor

KINDS = ("int8 weights", "weight scales", "bases", "trained in full", "moments", "fp32 masters", "buffers")


def resident(model: nn.Module, tensors: Sequence[TrainedTensor]) -> dict[str, int]:
    """Bytes by category of all that is kept between steps, for a ``model`` and its ``tensors``, which are attached."""
    for part in (part for tensor in tensors for part in tensor.parts):
        if part.leaf.numel():  # a rule without moments never steps its own
            part.step(torch.zeros_like(part.leaf), 0.0)  # for the inner optimizers to make their states
        part.scratch.release()
    sizes = _model_bytes(model)
    for layer, own in ((tensor.module, tensor.mine) for tensor in tensors if tensor.shared):
        sizes[_category(layer, "weight", own.weight)] -= layer.weight.nbytes - own.weight.nbytes
        if own.weight_scale is not None:
            sizes["weight scales"] -= layer.weight_scale.nbytes - own.weight_scale.nbytes
    of_rules = [tensor for tensor in tensors if tensor.keeps_whole]
    sizes["moments"] = state_bytes(tensors) + _extra_bytes(of_rules)
    sizes["fp32 masters"] = _extra_bytes([tensor for tensor in tensors if tensor not in of_rules])
    return {name: sizes[name] for name in KINDS}


def tensors_kept(model: nn.Module, tensors: Sequence[TrainedTensor]) -> Iterator[Tensor]:
    """All tensors that are there between steps, and the leaves that the inner optimizers step."""
    yield from (*model.parameters(), *model.buffers())
    for tensor in tensors:
        yield from tensor.tensors().values()
        for part in tensor.parts:
            yield part.leaf
            yield from (value for value in part.state().values() if torch.is_tensor(value))


def state_bytes(tensors: Sequence[TrainedTensor]) -> int:
    """Bytes of all that the inner optimizers of ``tensors`` keep, shared ones once."""
    sizes = {}
    for part in (part for tensor in tensors for part in tensor.parts):
        for value in part.state().values():
            if torch.is_tensor(value):
                sizes[value.untyped_storage()._cdata] = value.untyped_storage().nbytes()
    return sum(sizes.values())


def _extra_bytes(tensors: Sequence[TrainedTensor]) -> int:
    """Bytes of what ``tensors`` keep beside the model's tensors and the inner optimizers'."""
    return sum(value.untyped_storage().nbytes() for tensor in tensors for value in tensor.tensors().values())


def _model_bytes(model: nn.Module) -> Counter[str]:
    """Bytes of a converted model's own tensors by category, shared ones once."""
    sizes: Counter[str] = Counter()
    seen: set[int] = set()
    for module in model.modules():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                sizes[_category(module, key, tensor)] += tensor.untyped_storage().nbytes()
    return sizes


def _category(module: nn.Module, key: str, tensor: Tensor) -> str:
    if isinstance(module, LowRankLinear) and key in module.leaves():
        return "buffers"  # one zero each
    if key == "weight" and tensor.dtype == torch.int8:
        return "int8 weights"
    if key == "weight_scale":
        return "weight scales"
    if isinstance(module, Basis):
        return "bases"
    return "trained in full"
