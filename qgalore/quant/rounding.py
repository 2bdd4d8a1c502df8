"""Stochastic rounding, unbiased: E[round(x)] = x."""

import torch
from torch import Tensor

from .counter import uniform


def to_integer_stochastic(x: Tensor, bits: Tensor) -> Tensor:
    """Round fp32 ``x`` to an integer (as fp32): up with probability equal to the fractional part.

    ``bits``: int32 random bits of the same shape. Integers come back unchanged.
    """
    floor = torch.floor(x)
    return floor + (uniform(bits) < x - floor)


def to_bfloat16_stochastic(x: Tensor, bits: Tensor) -> Tensor:
    """Round fp32 ``x`` to bf16 between its two neighbours, up in magnitude with probability equal to the distance.

    Adds 16 random bits below the last kept mantissa bit and truncates; values already in bf16 come back unchanged.
    """
    raw = x.contiguous().view(torch.int32) + bits.bitwise_and(0xFFFF)
    return raw.bitwise_and_(-65536).view(torch.float32).to(torch.bfloat16)
