"""What an inner optimizer will keep, before it keeps it."""

from typing import Any

import torch

from .base import Part


def made_by_a_step(part: Part) -> dict[str, Any]:
    """The inner optimizer's state after a step with a gradient of zeros, tensors as empty ones on the meta device.
    Changes nothing."""
    before, groups = part.inner.state.pop(part.leaf, None), [dict(group) for group in part.inner.param_groups]
    try:
        part.step(torch.zeros(part.leaf.shape, device=part.leaf.device), 0.0)
        made = part.state()
    finally:
        part.inner.state.pop(part.leaf, None)
        if before is not None:
            part.inner.state[part.leaf] = before
        for group, old in zip(part.inner.param_groups, groups, strict=True):
            group.update(old)
        part.scratch.release()
    return {name: value.to("meta") if torch.is_tensor(value) else value for name, value in made.items()}
