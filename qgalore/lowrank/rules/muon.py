"""Muon (Jordan et al. 2024; scaled to Adam's step size as in arXiv 2502.16982): an orthogonalised momentum.

    B = μ · read(S) + G                        S: the momentum as it is stored, G: the step's gradient
    U = 0.2 √max(m, n) · orthogonalize(G + μ B)        Nesterov's look ahead
    W ← W (1 − lr·wd) − lr · scale · U
    S ← write(B)

An orthogonal m × n matrix has the Frobenius norm √min(m, n), so U has a root mean square of about 0.2 whatever the
shape. That is the size of Adam's update, and one learning rate suits all matrices. The momentum is quantized once in a
step. In ``4bit`` it takes 0.52 bytes a weight, in ``8bit`` 1.02.

A weight is orthogonalised as it is stored: an expert's matrix by itself, but fused ones (query, key and value in one
tensor, or gate and up) as one matrix.
"""

import math

import torch
from torch import Tensor

from ...quant.counter import derive_key
from ...quant.momentum import StoredMomentum
from ..layers.linear import LowRankLinear
from .common import Adam, Rows, Rule, RuleOptions
from .observed import cosine
from .orthogonal import orthogonalize

RMS = 0.2  # of Adam's update, which U is scaled to
_STREAM = 3  # apart from the bits of weights (0), of APOLLO's projection (1) and of LoRA's factors (2)


class Muon(Rule):
    """One momentum of the weight's own shape, and the step that wrote it last."""

    name = "muon"
    uses_inner = False

    def __init__(self, module: LowRankLinear, index: int, options: RuleOptions) -> None:
        super().__init__(module, index, options)
        rows, columns = module.weight.shape
        self.momentum = StoredMomentum(rows, columns, options.momentum, module.weight.device)
        self.written = torch.zeros((), dtype=torch.int64)  # the step, on the CPU: its value makes the key

    def _key(self, step: int) -> tuple[int, int]:
        return derive_key(self.options.seed, step, self.index, _STREAM)

    def direction(self, gradient: Tensor, step: int, adam: Adam) -> Rows:
        mu = self.options.mu
        momentum = self.momentum.read(self._key(int(self.written))).mul_(mu).add_(gradient)
        self.momentum.write(momentum, self._key(step))
        self.written.fill_(step)
        ahead = gradient.add_(momentum, alpha=mu)
        looked = self.observed and self.momentum.fmt != "fp32"
        lost = momentum.neg_().add_(self.momentum.read(self._key(step))).mul_(mu) if looked else None
        del momentum  # a whole matrix in fp32, which the products below have better use for
        update = orthogonalize(ahead)
        self.momentum_cosine = None if lost is None else cosine(update, orthogonalize(ahead.add_(lost)))
        update.mul_(RMS * math.sqrt(max(gradient.shape)))
        return lambda a, b: update[a:b].clone()

    def tensors(self) -> dict[str, Tensor]:
        return {"written": self.written, **self.momentum.tensors()}
