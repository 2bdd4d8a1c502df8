"""Which side of a gradient is projected, and the map G → R = LᵀGR̂. Its counterpart is ``quant.basis.update_rows``.

L is (out, r) or the identity, R̂ is (in, r) or the identity; None stands for the identity.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

TILE_ELEMENTS = 1 << 24  # 64 MiB of fp32: what a refresh works on at a time, whatever the gradient's size
PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")


def basis_sides(out_features: int, in_features: int, proj_type: str) -> tuple[bool, bool]:
    """(left?, right?): the sides of an (out, in) weight that get a basis.

    ``std`` puts it on the shorter dimension and ``reverse_std`` on the longer one, as GaLore names them (arXiv
    2403.03507, §4.2 and its code); a square matrix counts as tall. Raises ``ValueError`` for an unknown name.
    """
    tall = out_features >= in_features
    sides = {
        "std": (not tall, tall),
        "reverse_std": (tall, not tall),
        "left": (True, False),
        "right": (False, True),
        "full": (True, True),
    }
    if proj_type not in sides:
        raise ValueError(f"proj_type {proj_type!r} is not one of {PROJ_TYPES}")
    return sides[proj_type]


def fp32_tiles(matrix: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """(a, b, rows a … b−1 in fp32), one after the other: a large bf16 matrix gets no fp32 copy."""
    rows, width = matrix.shape
    step = max(1, TILE_ELEMENTS // width)
    for start in range(0, rows, step):
        yield start, min(start + step, rows), matrix[start : start + step].to(torch.float32)


def squared_lengths(gradient: Tensor, columns: Tensor) -> Tensor:
    """The squared lengths (k,), fp32, of the columns of G P for G (out, in) of any float dtype and fp32 P (in, k)."""
    total = torch.zeros(columns.shape[1], device=gradient.device)
    for _, _, tile in fp32_tiles(gradient):
        total += (tile @ columns).square_().sum(dim=0)
    return total


def project(gradient: Tensor, left: Tensor | None, right: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """R = Lᵀ G R̂ in ``dtype``, computed in fp32, for a gradient (out, in) of any float dtype and fp32 bases."""
    if left is None:
        if right is None:
            return gradient.to(dtype)
        image = right.new_empty(gradient.shape[0], right.shape[1], dtype=dtype)
        for a, b, tile in fp32_tiles(gradient):
            image[a:b] = tile @ right
        return image
    image = left.new_zeros(left.shape[1], gradient.shape[1])
    for a, b, tile in fp32_tiles(gradient):
        image.addmm_(left[a:b].T, tile)
    return (image if right is None else image @ right).to(dtype)
