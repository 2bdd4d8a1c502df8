"""APOLLO (arXiv 2412.05270, algorithm 1): a full-rank gradient step, scaled channel by channel as Adam would scale it.

With the shorter side of G projected, here for out < in (the other orientation is the transpose):

    R = Pᵀ G                     P (out, r) with entries from N(0, 1/r), drawn again every ``update_proj_gap`` steps
    N = Adam(R)                  m̂ / (√v̂ + ε), moments (r, in)
    s_j = ‖N_:j‖ / ‖R_:j‖        how much Adam shrinks or stretches channel j
    U_:j = s_j · G_:j            limited in its growth, ‖U_t‖ ≤ 1.01 · ‖U_{t−1}‖
    W ← W − lr · scale · U       scale = 1

P is a function of (seed, draw, layer) alone, so nothing is stored for it; at a new draw the moments stay as they are.

Left open by the paper and chosen here: Adam's bias correction is part of N (the authors' code puts it into the step
size, after the limiter, which then sees a norm that the correction would have changed in the first steps). A square
matrix is projected on its in side, as in GaLore. Their code's √scale after the limiter is our ``scale``.
"""

import math

import torch
from torch import Tensor

from ...quant.counter import derive_key, random_bits, uniform
from ..layers.linear import LowRankLinear
from .common import Adam, GrowthLimiter, Rows, Rule, RuleOptions, channel_scaling

_STREAM = 1  # apart from the bits that round this layer's weights, which (seed, step, index) names


def random_projection(dim: int, rank: int, key: tuple[int, int], device: torch.device | str = "cpu") -> Tensor:
    """(dim, rank) fp32, independent entries from N(0, 1/rank): Box and Muller's method on counter-based bits."""
    half = -(-dim * rank // 2)
    radius = uniform(random_bits(key, 0, half, device)).log_().mul_(-2.0).sqrt_()
    angle = uniform(random_bits(key, half, half, device)).mul_(2.0 * math.pi)
    values = torch.cat((radius * angle.cos(), radius * angle.sin()))[: dim * rank]
    return values.view(dim, rank) * rank**-0.5


class Apollo(Rule):
    """APOLLO with one factor for each channel of the longer side."""

    name = "apollo"

    def __init__(self, module: LowRankLinear, index: int, options: RuleOptions) -> None:
        super().__init__(module, index, options)
        self.rank = min(self.wanted_rank(), *module.weight.shape)
        self.tall = module.out_features >= module.in_features
        self.limiter = GrowthLimiter(self.device)

    def wanted_rank(self) -> int:
        assert self.options.rank is not None
        return self.options.rank

    def clamped_rank(self) -> int | None:
        return self.rank if self.rank < self.wanted_rank() else None

    def leaf_shape(self) -> torch.Size:
        long = max(self.module.weight.shape)
        return torch.Size((long, self.rank) if self.tall else (self.rank, long))

    def scaling(self, normalised: Tensor, projected: Tensor) -> Tensor:
        """Factors that broadcast to (out, in): (out, 1) or (1, in)."""
        return channel_scaling(normalised, projected, (1,) if self.tall else (0,))

    def direction(self, gradient: Tensor, step: int, adam: Adam) -> Rows:
        key = derive_key(self.options.seed, step // self.options.gap, self.index, _STREAM)
        basis = random_projection(min(gradient.shape), self.rank, key, gradient.device)
        projected = gradient @ basis if self.tall else basis.T @ gradient
        scaling = self.scaling(adam(projected), projected)
        sizes = torch.linalg.vector_norm(gradient, dim=1 if self.tall else 0, keepdim=True)
        factor = self.limiter.factor(torch.linalg.vector_norm(scaling * sizes))
        scaling = (scaling * factor).expand(gradient.shape)
        return lambda a, b: gradient[a:b] * scaling[a:b]

    def tensors(self) -> dict[str, Tensor]:
        return {"limit": self.limiter.previous}
