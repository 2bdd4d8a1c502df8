"""4-bit codes for Adam's moments, two to a byte: Li et al. 2023, "Memory Efficient Optimizers with 4-bit States"
(arXiv 2309.01507, sections 3 and 4). Plain PyTorch, for any device.

First moments take the 16 signed values of the dynamic data type in blocks of 128 values with one absmax. Second moments
lie between neighbours of very different size; a code with a zero would make some of them zero, and the step there as
large as ``eps`` allows. They take 1/16, 2/16, … 1 of the smaller of their row's and their column's largest value
("rank-1 normalisation, linear without zero"), so that what is small is rounded up and steps less.
"""

from functools import cache

import torch
from torch import Tensor

from .basis import pack_nibbles, unpack_nibbles
from .blockwise import dynamic_map

BLOCK = 128
LEVELS = 16
_TINY = torch.finfo(torch.float32).tiny


@cache
def signed_map(device: torch.device) -> Tensor:
    """The 16 ascending code values of first moments, fp32, on ``device``: 0, 1 and three decades of both signs."""
    return dynamic_map(signed=True, decades=3).to(device)


def encode_first(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Packed codes uint8 (⌈n/128⌉, 64) and absmax fp32 (⌈n/128⌉,) of n fp32 values of any shape, to the nearest."""
    # The last block is filled up with zeros, which change no maximum.
    flat = moment.reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    absmax, code = blocks.abs().amax(dim=1), signed_map(moment.device)
    # A code begins half-way between its value and the one below. A block of zeros is divided by the smallest float.
    unit = blocks / absmax.clamp_min(_TINY).unsqueeze(1)
    codes = torch.bucketize(unit, (code[1:] + code[:-1]) / 2, out_int32=True)
    return pack_nibbles(codes.to(torch.uint8)), absmax


def decode_first(packed: Tensor, absmax: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Inverse of :func:`encode_first`, fp32 of ``shape``."""
    values = signed_map(packed.device)[unpack_nibbles(packed, BLOCK).int()].mul_(absmax.unsqueeze(1))
    return values.view(-1)[: shape[0] * shape[1]].view(shape)


def _scale(rows: Tensor, columns: Tensor) -> Tensor:
    return torch.minimum(rows.unsqueeze(1), columns.unsqueeze(0))


def encode_second(moment: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Packed codes uint8 (n, ⌈m/2⌉) of a non-negative fp32 ``moment`` (n, m), to the nearest and at least 1/16.

    ``rows`` (n,) and ``columns`` (m,) are its largest values, or those of a larger matrix that it is part of.
    """
    # Level k stands for k/16 of the scale, and no value takes level 0: a zero would make the step as large as ``eps``
    # allows.
    level = (moment / _scale(rows, columns).clamp_min_(_TINY)).mul_(LEVELS).round_().clamp_(1, LEVELS)
    return pack_nibbles(level.sub_(1).to(torch.uint8))


def decode_second(packed: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Inverse of :func:`encode_second`: fp32 (n, m), positive where row and column hold any value that is not zero."""
    codes = unpack_nibbles(packed, columns.numel()).to(torch.float32)
    return codes.add_(1.0).mul_(1.0 / LEVELS).mul_(_scale(rows, columns))
