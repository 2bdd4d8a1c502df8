"""The stored basis of one side of a layer."""

import torch
from torch import Tensor, nn

from ...quant import basis, dispatch


class Basis(nn.Module):
    """Stored orthonormal columns (dim, rank) in one of ``quant.basis.FORMATS``; zero until first assigned."""

    codes: Tensor
    scale: Tensor | None

    def __init__(self, dim: int, rank: int, fmt: str, device: torch.device | None = None) -> None:
        super().__init__()
        self.dim, self.fmt = dim, fmt
        codes, scale = basis.empty(rank, dim, fmt, device)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)

    @property
    def rank(self) -> int:
        """How many columns there are now."""
        return self.codes.shape[0]

    def resize(self, rank: int) -> None:
        """Make room for ``rank`` columns, in new memory; they are zero until assigned."""
        self.codes, self.scale = basis.empty(rank, self.dim, self.fmt, self.codes.device)

    def assign(self, columns: Tensor) -> None:
        """Store ``columns`` fp32 (dim, rank)."""
        codes, scale = dispatch.encode(columns.T.contiguous(), self.fmt)
        self.codes.copy_(codes)
        # Both are None in the same formats.
        if scale is not None and self.scale is not None:
            self.scale.copy_(scale)

    def unfold(self, matrix: Tensor) -> Tensor:
        """A gradient (rows, dim) as the matrix whose right singular vectors are sought: here the gradient itself."""
        return matrix

    def reduce(self, columns: Tensor) -> Tensor:
        """What is stored of :meth:`columns`."""
        return columns

    def expand(self, columns: Tensor) -> Tensor:
        """Inverse of :meth:`reduce`: singular vectors of :meth:`unfold` as columns."""
        return columns

    def columns(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The stored basis (dim, rank), as the forward and the merge use it; a copy, which outlives :meth:`assign`."""
        columns = dispatch.decode(self.codes, self.scale, self.dim, self.fmt, dtype)
        return (columns.clone() if columns.data_ptr() == self.codes.data_ptr() else columns).T
