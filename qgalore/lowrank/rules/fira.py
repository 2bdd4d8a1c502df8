"""Fira (arXiv 2410.01623, §3): GaLore's step, and beside it what the subspace discards, scaled as Adam scales the rest.

With the layer's bases L, R̂ (here a left one alone: P), refreshed as GaLore's are:

    R = Pᵀ G,   N = Adam(R)
    S = G − P R                       the residual
    φ_j = ‖N_:j‖ / ‖R_:j‖             norm-based scaling, a factor for each column (each row for a right basis)
    U = φ ∘ S                         limited in its growth, ‖U_t‖ ≤ 1.01 · ‖U_{t−1}‖
    W ← W − lr · scale · (P N + U)

Left open by the paper and chosen here: ``scale`` is 1 and multiplies both parts, as in the paper's update; the authors'
code multiplies P N *and the P R that is taken off G* by α, which leaves (1 − α) P R in its residual. Bias correction is
part of N. Two bases (``proj_type: full``), which the code cannot do, take one factor for the matrix, the
paper's matrix-wise variant. With a 4-bit P, S is what P as stored discards.
"""

import torch
from torch import Tensor

from ...quant.basis import update_rows
from ...quant.int8 import row_tiles
from ..layers.linear import LowRankLinear
from ..subspace import sides
from .common import Adam, GrowthLimiter, Rows, Rule, RuleOptions, channel_scaling


class Fira(Rule):
    """GaLore's moments, and the limiter's last norm."""

    name = "fira"

    def __init__(self, module: LowRankLinear, index: int, options: RuleOptions) -> None:
        super().__init__(module, index, options)
        self.limiter = GrowthLimiter(self.device)

    def direction(self, gradient: Tensor, step: int, adam: Adam) -> Rows:
        left, right = self.module.columns()
        projected = sides.project(gradient, left, right)
        normalised = adam(projected)
        kept = update_rows(projected, left, right, 1.0)
        for a, b in row_tiles(*gradient.shape):
            gradient[a:b].sub_(kept(a, b))
        dims = (0, 1) if (left is None) == (right is None) else (0,) if right is None else (1,)
        scaling = channel_scaling(normalised, projected, dims)
        sizes = torch.linalg.vector_norm(gradient, dim=dims, keepdim=True)
        factor = self.limiter.factor(torch.linalg.vector_norm(scaling * sizes))
        scaling = (scaling * factor).expand(gradient.shape)
        inside = update_rows(normalised, left, right, 1.0)
        return lambda a, b: inside(a, b).add_(gradient[a:b] * scaling[a:b])

    def tensors(self) -> dict[str, Tensor]:
        return {"limit": self.limiter.previous}
