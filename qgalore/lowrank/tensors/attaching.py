"""Leaves and inner optimizers for all trained tensors of an optimizer."""

from typing import cast

import torch

from ..inner.checked import Factory
from ..subspace import ranks
from .base import STEPS_ON, Scratch, TrainedTensor


def attach(tensors: list[TrainedTensor], factory: Factory, part_elements: int) -> list[Scratch]:
    """Give every tensor its leaves and inner optimizers. One scratch memory for each device, as large as the largest
    leaf: only one leaf is real at a time. Returned unheld, and to be released after each step."""
    sizes: dict[torch.device, int] = {}
    devices = [getattr(tensor.leaves()[0], STEPS_ON, tensor.leaves()[0].device) for tensor in tensors]
    for device, tensor in zip(devices, tensors, strict=True):
        sizes[device] = max(sizes.get(device, 0), tensor.largest_part(part_elements))
    scratches = {device: Scratch(size, device) for device, size in sizes.items()}
    for device, tensor in zip(devices, tensors, strict=True):
        tensor.attach(scratches[device], factory, part_elements)
    free = [cast(ranks.Adaptive, tensor) for tensor in tensors if tensor.adaptive]
    ranks.share(free, factory)
    for scratch in scratches.values():
        scratch.release()
    return list(scratches.values())
