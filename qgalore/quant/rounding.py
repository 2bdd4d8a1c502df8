"""Stochastic rounding, unbiased: E[round(x)] = x."""

import torch
from torch import Tensor

from .counter import uniform_


def add_rounded_(whole: Tensor, x: Tensor, bits: Tensor, work: Tensor) -> Tensor:
    """``whole`` (integers) += fp32 ``x`` rounded to an integer: up with probability equal to the fractional part.

    ``bits``: int32 random bits of the same shape; ``work``: fp32 memory of it. Both and ``x`` are destroyed; returns
    ``whole``, exact below 2²⁴. An ``x`` that is an integer is added as it is.
    """
    torch.floor(x, out=work)
    whole.add_(work)
    return whole.add_(uniform_(bits).lt_(x.sub_(work)))


def to_bfloat16_stochastic(x: Tensor, bits: Tensor) -> Tensor:
    """Round fp32 ``x`` to bf16 between its two neighbours, up in magnitude with probability equal to the distance.

    Adds 16 random bits below the last kept mantissa bit and truncates; values already in bf16 come back unchanged.
    """
    raw = x.contiguous().view(torch.int32) + bits.bitwise_and(0xFFFF)
    return raw.bitwise_and_(-65536).view(torch.float32).to(torch.bfloat16)
