"""Row-normalised low-rank momentum: SCALE's normalisation on a gradient whose leading part is averaged over steps.

Not published; a hybrid of SCALE (arXiv 2506.16659) and GaLore (arXiv 2403.03507). With the layer's bases L, R̂ (here a
left one alone: P), refreshed as GaLore's are:

    R = Pᵀ G
    m ← 0.9 m + 0.1 R,   m̂ = m / (1 − 0.9^t)
    Z = G + P (m̂ − R)                            the gradient with its part in the subspace replaced by the average
    W_i ← W_i − lr · scale · √in · Z_i / ‖Z_i‖    for every row i (output neuron), scale = 1

One moment in the subspace, no second moment. At a refresh m turns into the new coordinates (``moments: rotate``),
stays, or is forgotten with its count. The moment is kept in bitsandbytes' 8-bit blockwise format beside ``adamw8bit``,
else in fp32; a step uses it before it is rounded, as 8-bit Adam does.
"""

import torch
from torch import Tensor

from ...quant.blockwise import BLOCK, dequantize, dynamic_map, quantize
from .. import sides
from ..linear import LowRankLinear
from .common import Adam, Rows, Rule, RuleOptions, unit_rms_rows

BETA = 0.9


class StoredMoment:
    """A moment of shape ``shape``, zero at first. ``8bit``: uint8 codes and an fp32 absmax for 256 values; ``fp32``."""

    def __init__(self, shape: torch.Size, fmt: str, device: torch.device) -> None:
        self.shape, self.fmt = shape, fmt
        self.values = torch.zeros(shape, dtype=torch.uint8 if fmt == "8bit" else torch.float32, device=device)
        self.absmax = torch.zeros(-(-shape.numel() // BLOCK) if fmt == "8bit" else 0, device=device)

    def read(self) -> Tensor:
        """fp32, a fresh tensor."""
        if self.fmt == "fp32":
            return self.values.clone()
        if self.values.is_meta:  # the memory plan's
            return torch.empty(self.shape, device="meta")
        if self.values.device.type == "cpu":
            return dequantize(self.values, self.absmax, dynamic_map(True))
        import bitsandbytes.functional as bnb

        return bnb.dequantize_blockwise(self.values.view(-1), absmax=self.absmax, blocksize=BLOCK).view(self.shape)

    def write(self, moment: Tensor) -> None:
        if self.fmt == "fp32":
            self.values.copy_(moment)
            return
        if self.values.is_meta:
            return
        if self.values.device.type == "cpu":
            codes, peaks = quantize(moment, dynamic_map(True))
            self.values.copy_(codes)
            self.absmax.copy_(peaks)
            return
        import bitsandbytes.functional as bnb

        codes, fresh = bnb.quantize_blockwise(moment.contiguous().view(-1), blocksize=BLOCK)
        self.values.copy_(codes.view(self.shape))
        self.absmax.copy_(fresh.absmax)


class Momentum(Rule):
    """One low-rank moment and the weight of what it has averaged, 1 − 0.9^t."""

    uses_basis = True
    uses_inner = False

    def __init__(self, module: LowRankLinear, index: int, options: RuleOptions) -> None:
        super().__init__(module, index, options)
        device = module.weight.device
        self.moment = StoredMoment(module.delta.shape, options.moment_format, device)
        self.weight = torch.zeros((), device=device)

    def direction(self, gradient: Tensor, step: int, adam: Adam) -> Rows:
        left, right = self.module.columns()
        projected = sides.project(gradient, left, right)
        moment = self.moment.read().mul_(BETA).add_(projected, alpha=1 - BETA)
        self.weight.mul_(BETA).add_(1 - BETA)
        self.moment.write(moment)
        inside = sides.update_rows(moment / self.weight - projected, left, right, 1.0)
        return lambda a, b: unit_rms_rows(inside(a, b).add_(gradient[a:b]))

    def change_basis(self, left: Tensor | None, right: Tensor | None) -> None:
        moment = self.moment.read()
        moment = moment if left is None else left @ moment
        self.moment.write(moment if right is None else moment @ right.T)

    def reset(self) -> None:
        self.moment.write(torch.zeros(self.moment.shape, device=self.weight.device))
        self.weight.zero_()

    def tensors(self) -> dict[str, Tensor]:
        state = {"moment": self.moment.values, "weight": self.weight}
        return state | ({"absmax": self.moment.absmax} if self.moment.fmt == "8bit" else {})
