"""LoRA (arXiv 2106.09685) as a baseline: a frozen stored weight beside two trained factors that are never merged.

    Y = X Wᵀ + (α/r) (X Aᵀ) Bᵀ        A: r × in, B: out × r, B zero at first

The factors are ordinary parameters: the same inner optimizer steps them as it does norms and embeddings.
"""

import math

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...quant.counter import derive_key
from .linear import LowRankLinear

_STREAM = 2  # apart from the bits of weights (0) and of APOLLO's projection (1)


class LoraLinear(LowRankLinear):
    """Takes over the tensors of a :class:`LowRankLinear` without bases, whose weight then stays as it is.

    ``lora_a`` (r, in) and ``lora_b`` (out, r) have ``dtype``; ``scaling`` is α/r. A comes from U(−1/√in, 1/√in), as in
    the authors' code, and is a function of (``seed``, ``index``).
    """

    def __init__(
        self, layer: LowRankLinear, rank: int, alpha: float, *, dtype: torch.dtype, seed: int, index: int
    ) -> None:
        nn.Module.__init__(self)
        vars(self).update(vars(layer))
        for leaf in self.leaves().values():
            leaf.requires_grad_(False)
        device = self.weight.device
        self.lora_rank, self.scaling = rank, alpha / rank
        first = torch.empty(rank, self.in_features, device=device)
        if not first.is_meta:
            generator = torch.Generator(device).manual_seed(derive_key(seed, index, _STREAM)[0] & 0x7FFFFFFF)
            first.uniform_(-1.0, 1.0, generator=generator).div_(math.sqrt(self.in_features))
        self.lora_a = nn.Parameter(first.to(dtype))
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, rank, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        inside = nn.functional.linear(x, self.lora_a.to(x.dtype))
        return super().forward(x) + nn.functional.linear(inside, self.lora_b.to(x.dtype)) * self.scaling

    def dense_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W + (α/r) B A (out, in), summed in fp32: what an export writes."""
        # Copies, whose place in memory is aligned: the order of a product's sums may hang on that.
        b, a = (factor.detach().to(torch.float32, copy=True) for factor in (self.lora_b, self.lora_a))
        product = b @ a
        # Written over the product: an fp32 weight is not copied before, and stays as it is.
        return torch.add(super().dense_weight(), product, alpha=self.scaling, out=product).to(dtype)


def attach(model: nn.Module, *, rank: int, alpha: float | None, dtype: torch.dtype, seed: int) -> int:
    """Turn every low-rank layer of ``model`` into a :class:`LoraLinear`; returns how many. ``alpha`` None: ``rank``.

    A rank above a matrix's smaller side is clamped to it, with α/r as it was. Raises :class:`ConfigError` for a layer
    that has bases.
    """
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, LowRankLinear)]
    for index, (name, layer) in enumerate(layers):
        if layer.left is not None or layer.right is not None:
            raise ConfigError(f"{name} has a basis; convert the model with rank=None before lora.attach")
        mine = min(rank, layer.in_features, layer.out_features)
        own = (alpha or rank) / rank * mine
        made = LoraLinear(layer, mine, own, dtype=dtype, seed=seed, index=index)
        model.set_submodule(name, made.train(layer.training))
    return len(layers)
