"""A tensor that is trained in full: embeddings, head, norms, biases, and everything under ``method: adamw``."""

import torch
from torch import Tensor, nn

from ...parallel import apart, shards
from ...parallel.handing import Handed
from ...quant import dispatch
from .base import TrainedTensor


class DenseTensor(TrainedTensor):
    """An ordinary parameter, which is its own leaf.

    fp32 tensors take the update as it is. Large bf16 ones are rounded stochastically; bf16 vectors (norms, biases) keep
    an fp32 master, since a stochastic walk of a few thousand values is worth avoiding for four bytes each.
    """

    def __init__(self, name: str, index: int, parameter: nn.Parameter) -> None:
        super().__init__(name, index, parameter.shape)
        self.parameter = parameter
        self.rows = rows if shards.is_shared(rows := apart.kept(parameter)) else None
        self.shards = shards.shards_of(rows)
        needs_master = parameter.dtype != torch.float32 and parameter.ndim < 2
        self.master = parameter.detach().to(torch.float32) if needs_master else None

    @property
    def group(self) -> str:
        return "dense" if self.parameter.ndim > 1 else "vector"

    @property
    def stored(self) -> Tensor:
        return self.parameter

    def leaves(self) -> list[nn.Parameter]:
        return [self.parameter]

    def arm(self, step: int) -> None:
        """Nothing to choose: the parameter always receives its gradient."""

    def gradient(self) -> Tensor | None:
        return self.parameter.grad

    def drop_gradient(self) -> None:
        self.parameter.grad = None

    @torch.no_grad()
    def merge(self, delta: Tensor, first: int, scale: float, shrink: float, key: tuple[int, int]) -> None:
        """Add ``scale`` (1 for all but low-rank layers) times ``delta`` to the rows from ``first`` on."""
        target = self.parameter.detach() if self.master is None else self.master
        rows = target.view(target.shape[0], -1) if target.ndim > 1 else target.view(1, -1)
        flat = delta.view(-1, rows.shape[1])
        rows = rows[first : first + flat.shape[0]]
        dispatch.write_back(rows, None, flat, s=scale, shrink=shrink, key=key, first_row=first)
        if self.master is not None:
            self.parameter.copy_(self.master)

    def handed(self, owner: int, bases: bool, weights: bool = True) -> list[Handed]:
        return [Handed(self.parameter.detach(), self.rows, owner)] if weights else []

    def tensors(self) -> dict[str, Tensor]:
        return {} if self.master is None else {"master": self.master}

    def traffic(self, gap: int) -> dict[str, float]:
        dtype = self.parameter.grad_dtype or self.parameter.dtype
        gradient, weight = float(self.parameter.numel() * dtype.itemsize), float(self.parameter.nbytes)
        if self.owner is None:
            return {"all-reduce dense gradients": gradient}
        if self.shards == 1:
            return {"reduce dense gradients": gradient, "broadcast matrices": weight}
        return {"gather matrices": self.gathered * weight, "reduce dense gradients": gradient, "hand out rows": weight}
