"""The parameter that a low-rank layer's weight is: it never has a gradient of its own, and can still be frozen."""

import copy
import weakref
from typing import Any

import torch
from torch import nn


class StoredWeight(nn.Parameter):
    """A weight that is stepped through its layer's zero leaves. ``requires_grad`` is always False, as int8 tensors must
    have it, but setting it, or :meth:`requires_grad_`, says whether those leaves may listen: False freezes the layer's
    weight, True frees it. ``owner`` is the layer."""

    owner: "weakref.ref[nn.Module]"

    def __new__(cls, data: torch.Tensor, requires_grad: bool = False) -> "StoredWeight":
        return super().__new__(cls, data, False)

    def owned_by(self, layer: nn.Module) -> "StoredWeight":
        self.owner = weakref.ref(layer)
        return self

    def requires_grad_(self, mode: bool = True) -> "StoredWeight":
        layer: Any = self.owner() if hasattr(self, "owner") else None  # a layer with ``leaves``
        for leaf in layer.leaves().values() if layer is not None else ():
            leaf.requires_grad_(mode)
        return self

    @property
    def requires_grad(self) -> bool:
        return False

    @requires_grad.setter
    def requires_grad(self, mode: bool) -> None:
        self.requires_grad_(mode)

    def __deepcopy__(self, memo: dict[int, Any]) -> "StoredWeight":
        """A copy without an owner: the layer's own copy takes it."""
        twin = StoredWeight(copy.deepcopy(self.data, memo))
        memo[id(self)] = twin
        return twin

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        return StoredWeight, (self.data,)
