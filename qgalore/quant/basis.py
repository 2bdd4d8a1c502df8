"""Storage formats of a projection basis: int4 and nf4 (two values to a byte), bf16, fp32.

A basis with ``dim`` rows and ``rank`` orthonormal columns is stored transposed, (rank, dim), so that each vector is
contiguous and its 4-bit groups (128, 64, 32 values or the whole vector) lie along it.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from .int8 import group_size_for

FORMATS = ("int4", "nf4", "bf16", "fp32")
INT4_MAX = 7
# Quantiles of N(0, 1), normalised to [-1, 1] with an exact zero: QLoRA (arXiv 2305.14314), appendix E.
NF4_CODE = (
    -1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.24611230, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
)  # fmt: skip


@cache
def _nf4_code(device: torch.device) -> Tensor:
    """The code on ``device``, copied there once: a copy in every decode would make a GPU wait."""
    return torch.tensor(NF4_CODE, device=device)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Pack uint8 codes < 16 of shape (rows, n) into (rows, ⌈n/2⌉) bytes, the even element in the low nibble."""
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor, n: int) -> Tensor:
    """Inverse of :func:`pack_nibbles`: uint8 codes (rows, n)."""
    return torch.stack((packed & 0xF, packed >> 4), dim=2).view(packed.shape[0], -1)[:, :n]


def empty(rank: int, dim: int, fmt: str, device: torch.device | str | None = None) -> tuple[Tensor, Tensor | None]:
    """Unset storage ``(codes, scale)`` for a basis of ``rank`` vectors of length ``dim``; None in bf16/fp32."""
    if fmt in ("bf16", "fp32"):
        return torch.zeros(rank, dim, dtype=torch.bfloat16 if fmt == "bf16" else torch.float32, device=device), None
    if fmt not in FORMATS:
        raise ValueError(f"basis format {fmt!r} is not one of {FORMATS}")
    codes = torch.zeros(rank, (dim + 1) // 2, dtype=torch.uint8, device=device)
    return codes, torch.zeros(rank, dim // group_size_for(dim), dtype=torch.bfloat16, device=device)


def encode(vectors: Tensor, fmt: str) -> tuple[Tensor, Tensor | None]:
    """Store ``vectors`` fp32 (rank, dim) in format ``fmt``; returns ``(codes, scale)`` shaped as by :func:`empty`."""
    rank, dim = vectors.shape
    if fmt in ("bf16", "fp32"):
        return vectors.to(torch.bfloat16 if fmt == "bf16" else torch.float32), None
    size = group_size_for(dim)
    # Each group is divided by its scale as stored, in bf16, so that decoding multiplies by what encoding divided by.
    grouped = vectors.float().view(rank, -1, size)
    top = INT4_MAX if fmt == "int4" else 1
    # CUDA divides by a Python number through its reciprocal, which rounds otherwise than a CPU. So it is a tensor.
    scale = (grouped.abs().amax(dim=2) / grouped.new_full((), top)).to(torch.bfloat16)
    # A group of zeros has a scale of 0. Dividing by the smallest number instead keeps its codes at zero.
    unit = grouped / scale.float().clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(2)
    if fmt == "int4":
        # The bytes hold whole numbers from 1 to 15, of which 8 stands for zero.
        codes = unit.round_().clamp_(-INT4_MAX, INT4_MAX).add_(8)
    else:
        # The nearest of the 16 values is found by the middles between neighbours.
        code = _nf4_code(vectors.device)
        codes = torch.bucketize(unit, (code[1:] + code[:-1]) / 2)
    return pack_nibbles(codes.to(torch.uint8).view(rank, dim)), scale


def decode(codes: Tensor, scale: Tensor | None, dim: int, fmt: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Vectors (rank, dim) in ``dtype``; computed in fp32, rounded once."""
    if scale is None:
        return codes.to(dtype)
    nibbles = unpack_nibbles(codes, dim)
    values = nibbles.float() - 8.0 if fmt == "int4" else _nf4_code(codes.device)[nibbles.int()]
    groups = scale.shape[1]
    return (values.view(codes.shape[0], groups, -1) * scale.float().unsqueeze(2)).view(-1, dim).to(dtype)


def update_rows(delta: Tensor, left: Tensor | None, right: Tensor | None, scale: float) -> Callable[[int, int], Tensor]:
    """A function (a, b) → rows a … b−1 of ``scale · L Δ R̂ᵀ``, so that the (out, in) product never exists whole."""
    if left is not None and right is not None:
        # L Δ is made once, for all rows. Each range of rows then costs one product.
        product = left @ delta
        return lambda a, b: (product[a:b] @ right.T).mul_(scale)
    if left is not None:
        return lambda a, b: (left[a:b] @ delta).mul_(scale)
    if right is not None:
        return lambda a, b: (delta[a:b] @ right.T).mul_(scale)
    return lambda a, b: delta[a:b] * scale
