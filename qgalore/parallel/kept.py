"""A tensor that one process keeps for all."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Kept:
    """A tensor of ``dtype`` and ``shape``. ``here``: its values, in the process ``owner`` alone."""

    owner: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    here: Tensor | None

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def elsewhere(self) -> "Kept":
        """It, as the other processes know it."""
        return replace(self, here=None)
