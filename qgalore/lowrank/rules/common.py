"""What the rules share: their interface, row normalisation, channel-wise scaling, and Fira's limiter."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ... import combinations
from ...parallel import shards
from ...quant.int8 import row_tiles
from ..layers.linear import LowRankLinear

Rows = Callable[[int, int], Tensor]  # (a, b) → rows a … b−1 of a direction, fp32, a fresh tensor
Adam = Callable[[Tensor], Tensor]  # a gradient → the inner optimizer's direction N, so that its step is −lr · N
FLOOR = 1e-8  # what the authors of APOLLO, Fira and SCALE keep their divisors above
MOMENTUM, MU = "4bit", 0.8  # Muon's: docs/lab/muon.md
GAMMA = 1.01  # the growth that Fira and APOLLO allow a norm from step to step


@dataclass(frozen=True)
class RuleOptions:
    """``rank``: of APOLLO's projection; ``gap``: steps between two projections; ``seed``: of the random streams;
    ``momentum`` and ``mu``: how Muon keeps its momentum, and the share of the old one in the new. ``largest_rms``: of
    ``scale · N``, in any layer; 0 for no limit."""

    rank: int | None = None
    gap: int = 200
    seed: int = 0
    momentum: str = MOMENTUM
    mu: float = MU
    largest_rms: float = 0.0


class Rule(ABC):
    """Owns the state of one layer; ``direction`` turns its full gradient into N with W ← W(1 − lr·wd) − lr · scale · N.

    ``name``: its key in ``combinations.RULES``. ``uses_inner``: has Adam moments, of a gradient of shape
    ``leaf_shape``, kept by the inner optimizer.
    """

    name = ""
    uses_inner = True
    joins = False  # whether ``directions(rules, gradients, step)`` takes several layers of one shape at once
    momentum_cosine: Tensor | None = None  # between the direction and what it would be of the momentum as it is stored

    def __init__(self, module: LowRankLinear, index: int, options: RuleOptions) -> None:
        """``module``: the layer that the rule steps; ``index``: the number of its random streams."""
        self.module, self.index, self.options = module, index, options
        # State is made beside the weight. Rows that processes share may wait in host memory, and gradients do not.
        self.device = (module.probe if shards.is_shared(module.weight) else module.weight).device

    @property
    def uses_basis(self) -> bool:
        """Whether it works in the layer's stored bases, which are refreshed as in GaLore."""
        return combinations.RULES[self.name].uses_basis

    def leaf_shape(self) -> torch.Size:
        """The shape of what the inner optimizer would step: Δ's in a subspace, nothing for a rule without moments."""
        return self.module.delta.shape if self.uses_basis and self.uses_inner else torch.Size([0])

    def clamped_rank(self) -> int | None:
        """Its rank, if that is lower than asked because the layer has no more; None otherwise."""
        return None

    @abstractmethod
    def direction(self, gradient: Tensor, step: int, adam: Adam) -> Rows:
        """N for the gradient G, fp32 (out, in), of optimizer step ``step``, by rows. G is used up: it may be
        overwritten, and the rows read it. Call it once a step: it advances the state."""

    def tensors(self) -> dict[str, Tensor]:
        """The rule's own state, for checkpoints; restored by copying into these tensors."""
        return {}


class GrowthLimiter:
    """Fira's norm-growth limiter (arXiv 2410.01623, §3.3): ‖U_t‖ ← min(‖U_t‖, γ · ‖U_{t−1}‖), γ = 1.01.

    ``previous`` is the norm after the last step, 0 before the first and after a zero update; then nothing is limited.
    (The authors' code would hold every later update near zero after a zero one.)
    """

    def __init__(self, device: torch.device) -> None:
        self.previous = torch.zeros((), device=device)

    def factor(self, norm: Tensor) -> Tensor:
        """What to multiply an update of norm ``norm`` (0-dim) by. No value leaves the device."""
        allowed = torch.where(self.previous > 0, torch.minimum(norm, GAMMA * self.previous), norm)
        self.previous.copy_(allowed)
        return torch.where(norm > 0, allowed / norm, 1.0)


def channel_scaling(normalised: Tensor, projected: Tensor, dims: tuple[int, ...]) -> Tensor:
    """‖N‖ / (‖R‖ + 10⁻⁸) along ``dims``, which are kept with size 1."""
    norms = (torch.linalg.vector_norm(t, dim=dims, keepdim=True) for t in (normalised, projected))
    top, bottom = norms
    return top / (bottom + FLOOR)


def limited(rows: Rows, shape: torch.Size, limit: float) -> Rows:
    """``rows`` of a matrix of this ``shape``, made smaller where their root mean square is above ``limit``: Adafactor's
    clipping of an update (arXiv 1804.04235, §6). They are asked for twice. No value leaves the device."""
    squares = torch.stack([rows(a, b).square_().sum() for a, b in row_tiles(*shape)]).sum()
    factor = (limit * (shape.numel() / squares).sqrt()).clamp(max=1.0)  # 1 for zeros, whose quotient is infinite
    return lambda a, b: rows(a, b).mul_(factor)


def unit_rms_rows(rows: Tensor) -> Tensor:
    """Rows (n, width) scaled to a root mean square of 1 each, that is by √width / ‖row‖; zero rows stay zero."""
    return rows / rows.square().mean(dim=1, keepdim=True).sqrt_().clamp_min_(FLOOR)
