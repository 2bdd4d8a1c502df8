"""Leaves and inner optimizers for all trained tensors of an optimizer."""

import math
from typing import cast

import torch

from ..inner.checked import Factory
from ..subspace import ranks
from ..subspace.moments import BLOCK
from .base import STEPS_ON, Scratch, TrainedTensor


def attach(tensors: list[TrainedTensor], factory: Factory, part_elements: int) -> list[Scratch]:
    """Give every tensor its leaves and inner optimizers. One scratch memory for each device, as large as the largest
    leaf: only one leaf is real at a time. Returned unheld, and to be released after each step."""
    sizes: dict[torch.device, int] = {}
    devices = [getattr(tensor.leaves()[0], STEPS_ON, tensor.leaves()[0].device) for tensor in tensors]
    ranges = [_row_ranges(tensor, part_elements) for tensor in tensors]
    for device, tensor, parts in zip(devices, tensors, ranges, strict=True):
        sizes[device] = max(sizes.get(device, 0), _elements(tensor, *parts[0]))
    scratches = {device: Scratch(size, device) for device, size in sizes.items()}
    for device, tensor, parts in zip(devices, tensors, ranges, strict=True):
        tensor.attach(scratches[device], factory, parts)
    free = [cast(ranks.Adaptive, tensor) for tensor in tensors if tensor.adaptive]
    ranks.share(free, factory)
    for scratch in scratches.values():
        scratch.release()
    return list(scratches.values())


def _row_ranges(tensor: TrainedTensor, limit: int) -> list[tuple[int, int]]:
    """Row ranges of the parts, of about ``limit`` elements at most, each whole 8-bit blocks but the last."""
    shape = tensor.shape
    rows, size = shape[0] if len(shape) else 1, shape.numel()
    if size <= limit or not tensor.by_rows or len(shape) < 2:
        return [(0, rows)]
    # The fewest rows that fill whole blocks of 8-bit moments, so that a part's codes are those of the whole tensor.
    unit = BLOCK // math.gcd(BLOCK, size // rows)
    # As few parts as ``limit`` allows, of nearly equal size.
    step = -(-rows // -(-size // limit) // unit) * unit
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _elements(tensor: TrainedTensor, a: int, b: int) -> int:
    """Of the scratch memory that rows a … b−1 need, the largest part's."""
    shape = tensor.shape
    return shape.numel() if len(shape) < 2 else (b - a) * (shape.numel() // shape[0])
