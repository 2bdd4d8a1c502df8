"""A guard on a converted layer: its weight is moved by a qgalore.optimizer alone, so a gradient for nobody is an error.

It is a hook on Δ and the probe, called when a backward pass has filled one of them. So nothing is asked in a forward
pass, for gradients of activations, nor of frozen layers, and a step pays for one weak reference a layer.
"""

import weakref
from typing import Any

import torch

from ...errors import ConfigError


class Guard:
    """Hook on the leaves of the layer ``name``, which raises where no optimizer that steps the layer is alive. A copy,
    or what is read from a file, belongs to no optimizer yet."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._holder: weakref.ref[Any] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Guard":
        return Guard(self.name)

    def __reduce__(self) -> tuple[Any, ...]:
        return Guard, (self.name,)

    def held_by(self, optimizer: torch.optim.Optimizer) -> None:
        """``optimizer`` steps the layer from now on. It is not kept alive."""
        self._holder = weakref.ref(optimizer)

    def __call__(self, leaf: torch.Tensor) -> None:
        if self._holder is None or self._holder() is None:
            raise ConfigError(
                f"layer {self.name} received a gradient, but no qgalore.optimizer that steps it is alive; a converted "
                "layer's weight is no parameter that another optimizer could move, so it would never change. Make "
                "optimizer = qgalore.optimizer(model, lr=...) for this model before the backward pass and keep it, or "
                "freeze the layer with requires_grad_(False)"
            )
