"""What a step of a rule on whole gradients tells about a layer: how far it moves the weight, and what the code of a
stored momentum costs.

Looked at in every ``EVERY``-th step alone, so that it costs little: a pass over the weight and, for a momentum that is
not kept in fp32, one more orthogonalisation. Nothing here changes training or draws from its random streams.
"""

import torch
from torch import Tensor

from ...quant.int8 import write_back_tiles
from ..layers.linear import LowRankLinear, stored_weight
from .common import Rows

EVERY = 50  # steps; the first is looked at too
VERSION = 1  # of a row of updates.jsonl


def due(step: int) -> bool:
    """Whether ``step``, counted from 0, is looked at."""
    return step % EVERY == 0


def cosine(one: Tensor, other: Tensor) -> Tensor:
    """The cosine between two tensors of one shape, fp32, as a 0-dim tensor; nan if one of them is zero."""
    product = torch.dot(one.reshape(-1), other.reshape(-1))
    return product / (torch.linalg.vector_norm(one) * torch.linalg.vector_norm(other))


class Observation:
    """One step of one layer, looked at while it is taken. Its figures stay on the device until :meth:`row`."""

    def __init__(self, name: str, step: int, module: LowRankLinear) -> None:
        """``step`` counts from 0; the weight of ``module`` is as before the step."""
        self.name, self.step, self.shape = name, step, tuple(module.weight.shape)
        self.momentum_cosine: Tensor | None = None
        weight = module.weight.detach()
        self._update = torch.zeros((), device=weight.device)
        self._weight = torch.zeros((), device=weight.device)
        for a, b in write_back_tiles(weight):
            scale = None if module.weight_scale is None else module.weight_scale[a:b]
            self._weight += stored_weight(weight[a:b], scale, torch.float32).square().sum()

    def watch(self, rows: Rows, rate: float) -> Rows:
        """``rows``, of which ``rate`` times is the change of the weight before it is rounded. Each may be asked for
        once."""

        def watched(a: int, b: int) -> Tensor:
            found = rows(a, b)
            self._update += (rate * torch.linalg.vector_norm(found)).square()
            return found

        return watched

    def row(self) -> dict:
        """For ``updates.jsonl``, with the step counted from 0. Waits for the device."""
        values = self.shape[0] * self.shape[1]
        rms = {"update_rms": self._update, "weight_rms": self._weight}
        found = {name: float(f"{(float(squares) / values) ** 0.5:.5g}") for name, squares in rms.items()}
        cosine = None if self.momentum_cosine is None else round(float(self.momentum_cosine), 5)
        head = {"version": VERSION, "step": self.step, "layer": self.name, "shape": list(self.shape)}
        return head | found | {"momentum_cosine": cosine}


class Told:
    """What another process has looked at."""

    def __init__(self, row: dict) -> None:
        self.name, self._row = row["layer"], row

    def row(self) -> dict:
        """As :meth:`Observation.row`."""
        return self._row
