"""Activation checkpointing of transformer blocks: only each block's input is kept, which may wait in pinned host
memory, and backward runs the block again."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from ..errors import ConfigError
from ..steps import activations
from .compiling import blocks_of

_OFFLOADED_ELEMENTS = 1 << 12  # smaller tensors (a dummy, a mask's offset) are not worth a copy


def _to_host(tensor: Tensor) -> tuple[torch.device, Tensor]:
    if tensor.device.type == "cpu" or tensor.numel() < _OFFLOADED_ELEMENTS:
        return tensor.device, tensor
    packed = activations.host_buffer(tensor)
    packed.copy_(tensor, non_blocking=True)
    return tensor.device, packed


def _from_host(packed: tuple[torch.device, Tensor]) -> Tensor:
    device, values = packed
    if values.is_meta:  # a plan: what comes back takes memory on the device again
        return torch.empty_like(values)
    return values.to(device, non_blocking=True)


def _checkpoint_in_host_memory(function, *args, **kwargs):
    with saved_tensors_hooks(_to_host, _from_host):
        return checkpoint(function, *args, use_reentrant=False, **kwargs)


FUNCTIONS = {"device": partial(checkpoint, use_reentrant=False), "host": _checkpoint_in_host_memory}


def checkpoint_blocks(model: nn.Module, where: str, but_last: int = 0) -> None:
    """Checkpoint the blocks of a transformers model ``but_last`` so many, their inputs kept in ``where``: ``device`` or
    ``host``. Raises :class:`ConfigError` for an architecture that cannot."""
    blocks = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    if not blocks or not getattr(model, "supports_gradient_checkpointing", False):
        raise ConfigError(
            f"{type(model).__name__} has no blocks that transformers can checkpoint; set "
            "train.activation_checkpointing=false"
        )
    layers = blocks_of(model)
    plain = layers[max(0, len(layers) - but_last) :]
    for block in (module for module in blocks if module not in plain):
        block.gradient_checkpointing = True
        block._gradient_checkpointing_func = FUNCTIONS[where]
