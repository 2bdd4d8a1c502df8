"""How a momentum matrix is stored between steps: fp32, bf16, 8 bits or 4 bits a value.

The 4-bit code takes out the size of each row and of each column before it rounds. For B (m, n), fp32,

    r_i = rms of row i,    k_j = rms of column j of B / r,    V = B / (r k)
    s = the largest |V| of each group along a row, in bf16, rounded up
    code = round(7.5 V / s + u), in [−8, 7],       u uniform in (−1, 0), known again when the code is read
    read:  B ≈ r k s (code − u) / 7.5

Adding u before rounding and subtracting it after is *subtractive dither*. The error is uniform in half a step either
way, has mean zero and does not depend on the value. u is a hash of (key, element), so nothing is stored for it.
docs/lab/muon.md measures what the scales and the dither are worth.

The 8-bit code has one scale for a group and rounds stochastically, also without bias. bf16 rounds to the nearest.

A group has 128 values, as an int8 weight's has, or 64 or 32 where 128 does not divide n, or else the whole row. What is
left in a group after the division by r and k is nearly Gaussian, and the largest of a long row of such values is only
some 40 % above that of 128.
"""

import torch
from torch import Tensor

from .basis import pack_nibbles, unpack_nibbles
from .counter import random_bits, uniform_
from .int8 import group_size_for, write_back_tiles

FORMATS = ("4bit", "8bit", "bf16", "fp32")
LEVELS = 7.5  # half the number of steps between the codes −8 and 7
QMAX = 127
TINY = 1e-30  # what a divisor is kept above: zeros stay zero


class StoredMomentum:
    """An m × n matrix kept in ``fmt``. Zero at first.

    ``write`` takes the key of this write's random bits; ``read`` needs the same key, so its owner must know which step
    wrote last. ``tensors`` are what a checkpoint holds.
    """

    def __init__(self, rows: int, columns: int, fmt: str, device: torch.device | str = "cpu") -> None:
        if fmt not in FORMATS:
            raise ValueError(f"momentum format {fmt!r} is unknown; it must be one of {FORMATS}")
        self.shape, self.fmt, self.group = (rows, columns), fmt, group_size_for(columns)
        groups = columns // self.group

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        if fmt == "4bit":
            self._tensors = {
                "codes": zeros(rows, (columns + 1) // 2, dtype=torch.uint8),  # two to a byte
                "scales": zeros(rows, groups, dtype=torch.bfloat16),
                "rows": zeros(rows, dtype=torch.float32),
                "columns": zeros(columns, dtype=torch.float32),
            }
        elif fmt == "8bit":
            self._tensors = {
                "codes": zeros(rows, columns, dtype=torch.int8),
                "scales": zeros(rows, groups, dtype=torch.bfloat16),
            }
        else:
            self._tensors = {"values": zeros(rows, columns, dtype=torch.float32 if fmt == "fp32" else torch.bfloat16)}

    def tensors(self) -> dict[str, Tensor]:
        return self._tensors

    def read(self, key: tuple[int, int]) -> Tensor:
        """The matrix, fp32, a fresh tensor. ``key`` is the one it was written with."""
        stored = self._tensors
        if self.fmt == "4bit":
            return read_4bit(stored["codes"], stored["scales"], stored["rows"], stored["columns"], key)
        if self.fmt == "8bit":
            return read_8bit(stored["codes"], stored["scales"])
        return stored["values"].to(torch.float32, copy=True)

    def write(self, matrix: Tensor, key: tuple[int, int]) -> None:
        """Store fp32 ``matrix`` (m, n), with the random bits of ``key``."""
        stored = self._tensors
        if self.fmt == "4bit":
            write_4bit(matrix, stored["codes"], stored["scales"], stored["rows"], stored["columns"], key)
        elif self.fmt == "8bit":
            write_8bit(matrix, stored["codes"], stored["scales"], key)
        else:
            stored["values"].copy_(matrix)


def _dither(key: tuple[int, int], first: int, tile: Tensor) -> Tensor:
    """u, fp32 of the shape of ``tile`` (rows, n), uniform in (−1, 0). ``first``: the number of the tile's first row."""
    rows, width = tile.shape
    return uniform_(random_bits(key, first * width, rows * width, tile.device)).view(tile.shape).sub_(1.0)


def _scales_of(value: Tensor, groups: int) -> Tensor:
    """The largest magnitude of each group of ``value`` (rows, n), as bf16 (rows, groups).

    bf16's nearest may lie 2⁻⁹ below, and the code would then cut the largest value. Hence it is raised first.
    """
    return value.view(len(value), groups, -1).abs().amax(dim=2).mul_(1.0 + 2.0**-8).to(torch.bfloat16)


def _in_units_(value: Tensor, scales: Tensor) -> Tensor:
    """``value`` (rows, n) divided in place by its groups' ``scales``."""
    divisor = scales.to(torch.float32).clamp_min_(TINY).unsqueeze(2)
    value.view(len(value), scales.shape[1], -1).div_(divisor)
    return value


def _from_units_(value: Tensor, scales: Tensor) -> Tensor:
    """Inverse of :func:`_in_units_`."""
    value.view(len(value), scales.shape[1], -1).mul_(scales.to(torch.float32).unsqueeze(2))
    return value


@torch.no_grad()
def write_4bit(
    matrix: Tensor, codes: Tensor, scales: Tensor, rows: Tensor, columns: Tensor, key: tuple[int, int]
) -> None:
    """``matrix`` (m, n) fp32 into ``codes`` uint8 (m, ⌈n/2⌉), ``scales`` bf16 (m, groups), ``rows`` fp32 (m,) and
    ``columns`` fp32 (n,). Twice over the tiles, since a column's size is needed before anything is rounded."""
    height, width = matrix.shape
    torch.linalg.vector_norm(matrix, dim=1, out=rows).mul_(width**-0.5)
    columns.zero_()
    for a, b in write_back_tiles(matrix):
        columns.add_((matrix[a:b] / rows[a:b].clamp_min(TINY).unsqueeze(1)).square_().sum(dim=0))
    columns.div_(height).sqrt_()
    divisor = columns.clamp_min(TINY)
    for a, b in write_back_tiles(matrix):
        value = (matrix[a:b] / rows[a:b].clamp_min(TINY).unsqueeze(1)).div_(divisor)
        scales[a:b] = _scales_of(value, scales.shape[1])
        value = _in_units_(value, scales[a:b]).mul_(LEVELS).add_(_dither(key, a, value))
        codes[a:b] = pack_nibbles(value.round_().clamp_(-8, 7).add_(8).to(torch.uint8))


@torch.no_grad()
def read_4bit(codes: Tensor, scales: Tensor, rows: Tensor, columns: Tensor, key: tuple[int, int]) -> Tensor:
    """The inverse of :func:`write_4bit`, fp32 (m, n)."""
    out = torch.empty(len(rows), len(columns), device=codes.device)
    for a, b in write_back_tiles(out):
        tile = out[a:b].copy_(unpack_nibbles(codes[a:b], len(columns))).sub_(8.0)
        tile.sub_(_dither(key, a, tile)).div_(LEVELS)
        _from_units_(tile, scales[a:b]).mul_(columns).mul_(rows[a:b].unsqueeze(1))
    return out


@torch.no_grad()
def write_8bit(matrix: Tensor, codes: Tensor, scales: Tensor, key: tuple[int, int]) -> None:
    """``matrix`` (m, n) fp32 into ``codes`` int8 (m, n) and ``scales`` bf16 (m, groups), the size of a code's step."""
    for a, b in write_back_tiles(matrix):
        scales[a:b] = _scales_of(matrix[a:b] / QMAX, scales.shape[1])
        value = _in_units_(matrix[a:b].clone(), scales[a:b])
        codes[a:b] = value.add_(_dither(key, a, value)).ceil_().clamp_(-QMAX, QMAX)


@torch.no_grad()
def read_8bit(codes: Tensor, scales: Tensor) -> Tensor:
    """The inverse of :func:`write_8bit`, fp32 (m, n)."""
    return _from_units_(codes.to(torch.float32), scales)
