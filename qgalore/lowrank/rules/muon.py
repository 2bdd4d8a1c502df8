"""Muon (Jordan et al. 2024; scaled to Adam's step size as in arXiv 2502.16982): an orthogonalised momentum.

    B = μ · read(S) + G                        S: the momentum as it is stored, G: the step's gradient
    U = 0.2 √max(m, n) · orthogonalize(G + μ B)        Nesterov's look ahead
    W ← W (1 − lr·wd) − lr · scale · U
    S ← write(B)

An orthogonal m × n matrix has the Frobenius norm √min(m, n), so U has a root mean square of about 0.2 whatever the
shape. That is the size of Adam's update, and one learning rate suits all matrices. The momentum is quantized once in a
step. In ``4bit`` it takes 0.52 bytes a weight, in ``8bit`` 1.02.

Where a weight holds several matrices, as query, key and value in one tensor, U is that of each by itself
(:mod:`.fused`). So is an expert's.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...quant.counter import derive_key
from ...quant.momentum import StoredMomentum
from ..layers.linear import LowRankLinear
from .common import Adam, Rows, Rule, RuleOptions
from .observed import cosine, due
from .orthogonal import orthogonalize

RMS = 0.2  # of Adam's update, which U is scaled to
_STREAM = 3  # apart from the bits of weights (0), of APOLLO's projection (1) and of LoRA's factors (2)


class Muon(Rule):
    """One momentum of the weight's own shape, and the step that wrote it last."""

    name = "muon"
    uses_inner = False
    joins = True

    def __init__(self, module: LowRankLinear, index: int, options: RuleOptions) -> None:
        super().__init__(module, index, options)
        rows, columns = module.weight.shape
        self.momentum = StoredMomentum(rows, columns, options.momentum, self.device)
        self.written = torch.zeros((), dtype=torch.int64, device="cpu")  # the step: its value makes the key

    def _key(self, step: int) -> tuple[int, int]:
        return derive_key(self.options.seed, step, self.index, _STREAM)

    def _look_ahead(self, gradient: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
        """Add ``gradient`` to the momentum and store it. Returns G + μ B, in the memory of G, and, if that is asked
        for, what B would change in it by having been stored."""
        mu = self.options.mu
        momentum = self.momentum.read(self._key(int(self.written))).mul_(mu).add_(gradient)
        self.momentum.write(momentum, self._key(step))
        self.written.fill_(step)
        ahead = gradient.add_(momentum, alpha=mu)
        looked = due(step) and self.momentum.fmt != "fp32"
        lost = momentum.neg_().add_(self.momentum.read(self._key(step))).mul_(mu) if looked else None
        return ahead, lost

    def direction(self, gradient: Tensor, step: int, adam: Adam) -> Rows:
        return self.directions([self], [gradient], step)[0]

    @classmethod
    def directions(cls, rules: Sequence[Any], gradients: Sequence[Tensor], step: int) -> list[Rows]:
        """:meth:`direction` of each of ``rules``, whose ``gradients`` have one shape and parts, by common products."""
        pairs = [rule._look_ahead(gradient, step) for rule, gradient in zip(rules, gradients, strict=True)]
        ahead, lost = _stacked([ahead for ahead, _ in pairs]), [lost for _, lost in pairs]
        del pairs
        parts = rules[0].module.row_parts
        updates = _orthogonal(ahead, parts)
        if lost[0] is not None:
            others = _orthogonal(ahead.add_(_stacked([one for one in lost if one is not None])), parts)
            for rule, update, other in zip(rules, _each(updates), _each(others), strict=True):
                rule.momentum_cosine = cosine(update, other)
        return [partial(_rows, update) for update in _each(updates)]

    def tensors(self) -> dict[str, Tensor]:
        return {"written": self.written, **self.momentum.tensors()}


def _orthogonal(ahead: Tensor, parts: Sequence[int] | None) -> Tensor:
    """U, fp32, of ``ahead`` (…, m, n), or of each of its ``parts``, which have so many of its m rows."""
    each = ahead.split(list(parts or ahead.shape[-2:-1]), dim=-2)
    updates = [orthogonalize(one).mul_(RMS * math.sqrt(max(one.shape[-2:]))) for one in each]
    return updates[0] if len(updates) == 1 else torch.cat(updates, dim=-2)


def _stacked(matrices: list[Tensor]) -> Tensor:
    """(b, m, n); a single matrix stays as it is, without a copy."""
    return torch.stack(matrices) if len(matrices) > 1 else matrices[0]


def _each(stacked: Tensor) -> Sequence[Tensor]:
    """Inverse of :func:`_stacked`."""
    return stacked.unbind() if stacked.ndim == 3 else [stacked]


def _rows(update: Tensor, a: int, b: int) -> Tensor:
    return update[a:b].clone()
