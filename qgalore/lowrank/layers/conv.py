"""Convolution kernels: gradients of order 3 and 4, projected on both channel dimensions.

A Tucker decomposition on modes 1 and 2, after Tensor-GaLore (arXiv 2501.02379): the gradient G (out, in, k…) of a
kernel is kept as its core G ×₁ U₁ᵀ ×₂ U₂ᵀ (r₁, r₂, k…), U₁ and U₂ the leading singular vectors of its unfoldings
(HOSVD). The paper projects every mode; a kernel's spatial ones have 3 or 5 entries and stay whole here. With the kernel
flattened to (out, in·k) this is a basis on both sides, U₁ and U₂ ⊗ I, so that slots, refreshes and merges are those of
matrices.

The Δ formulation holds: in Y = conv(X, W + Δ ×₁ U₁ ×₂ U₂) Δ's gradient is the weight gradient of a convolution of
X U₂ (r₂ channels) that has the output gradient U₁ᵀ dY (r₁ channels). G is never formed but for a refresh.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from .bases import Basis
from .linear import LowRankLinear, zero_leaf
from .stored import StoredWeight

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


class BlockBasis(Basis):
    """U ⊗ I for a stored U (dim, rank) and the identity of ``block`` entries, those of a kernel's positions."""

    def __init__(self, dim: int, rank: int, fmt: str, block: int, device: torch.device | None = None) -> None:
        super().__init__(dim, rank, fmt, device)
        self.block = block

    def assign(self, columns: Tensor) -> None:
        """Store ``columns`` fp32 (dim · block, rank · block), which are U ⊗ I."""
        super().assign(self.reduce(columns))

    def reduce(self, columns: Tensor) -> Tensor:
        return columns[:: self.block, :: self.block]

    def expand(self, columns: Tensor) -> Tensor:
        return torch.kron(columns.contiguous(), torch.eye(self.block, dtype=columns.dtype, device=columns.device))

    def unfold(self, matrix: Tensor) -> Tensor:
        """A kernel's gradient (out, dim · block) as its unfolding along the second mode, transposed: (out · block,
        dim), whose right singular vectors are U."""
        return matrix.view(len(matrix), self.dim, self.block).transpose(1, 2).reshape(-1, self.dim)

    def columns(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """U ⊗ I (dim · block, rank · block)."""
        return self.expand(super().columns(dtype))

    def channels(self, dtype: torch.dtype) -> Tensor:
        """U alone (dim, rank)."""
        return super().columns(dtype)


def _on_channels(x: Tensor, columns: Tensor) -> Tensor:
    """x (n, c, …) with its channels multiplied by ``columns`` (c, r)."""
    # torch documents a pair of lists, and annotates a number
    dims: Any = ([1], [0])
    return torch.tensordot(x, columns, dims=dims).movedim(-1, 1)


class _DeltaConv(torch.autograd.Function):
    """conv(X, W) + b; backward gives dX, db and whichever of dΔ, dprobe is asked for."""

    @staticmethod
    def forward(ctx, x, weight, bias, delta, probe, layer):
        ctx.save_for_backward(x, weight)
        ctx.layer = layer
        kernel = weight.view(layer.kernel_shape).to(x.dtype)
        return layer.convolve(x, kernel, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx, grad_output):
        x, weight = ctx.saved_tensors
        layer, needs = ctx.layer, ctx.needs_input_grad
        kernel = weight.view(layer.kernel_shape).to(x.dtype)
        grad_x = grad_bias = grad_delta = grad_probe = None
        if needs[0]:
            grad_x = layer.gradients(grad_output, x, kernel, 0)
        if needs[2]:
            rest = [d for d in range(grad_output.ndim) if d != 1]
            grad_bias = grad_output.sum(rest, dtype=torch.float32).to(layer.bias.dtype)
        # The probe receives the gradient of the whole kernel, where a refresh is due.
        if needs[4]:
            full = layer.gradients(grad_output, x, kernel, 1)
            grad_probe = full.reshape(layer.probe.shape).to(layer.probe.dtype)
        # Δ's is the weight gradient of a smaller convolution, of r₂ input channels and r₁ output channels.
        if needs[3]:
            if layer.left is not None:
                grad_output = _on_channels(grad_output, layer.left.columns(x.dtype))
            if layer.right is not None:
                x = _on_channels(x, layer.right.channels(x.dtype))
            # Only the shape of this kernel is read: the gradient of a convolution does not depend on its values.
            core = kernel.new_empty(grad_output.shape[1], x.shape[1], *kernel.shape[2:])
            found = layer.gradients(grad_output.contiguous(), x.contiguous(), core, 1)
            grad_delta = found.reshape(layer.delta.shape).to(layer.delta.dtype)
        return grad_x, None, grad_bias, grad_delta, grad_probe, None


class LowRankConv(LowRankLinear):
    """Replacement for an ``nn.Conv1d``, ``Conv2d`` or ``Conv3d`` of one group and zero padding (see :func:`problem`).

    ``weight``: the kernel in its own dtype, flattened to (out, in · k); ``left``: :class:`Basis` (out, r₁) and
    ``right``: :class:`BlockBasis` (in, r₂), each r at most ``rank`` and what that side's unfolding can have
    (:func:`side_ranks`), None where r is the channels' number. ``delta``: (r₁, r₂ · k). ``rank`` None: no projection.
    ``notes``: where ``rank`` is not what is used.
    """

    kernel_shape: torch.Size
    right: BlockBasis | None

    def __init__(self, conv: Conv, *, rank: int | None, basis_format: str, grad_dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.kernel_shape = conv.weight.shape
        out, channels, *positions = self.kernel_shape
        block = math.prod(positions)
        device = conv.weight.device
        self.out_features, self.in_features = out, channels * block
        self.rank, self.basis_format, self.transposed = rank, basis_format, False
        self.weight = StoredWeight(conv.weight.detach().reshape(out, -1)).owned_by(self)
        self.register_buffer("weight_scale", None)
        self.register_parameter("bias", None if conv.bias is None else nn.Parameter(conv.bias.detach()))
        r_out, r_in = side_ranks(rank, out, channels, block)
        self.notes = [
            f"rank {rank} is above what a kernel of {out} × {channels} × {block} has on its {side} side; {used} is used"
            for side, used in (("output", r_out), ("input", r_in))
            if rank is not None and used < rank
        ]
        self.left = Basis(out, r_out, basis_format, device) if r_out < out else None
        self.right = BlockBasis(channels, r_in, basis_format, block, device) if r_in < channels else None
        self.delta = zero_leaf(r_out, r_in * block, dtype=grad_dtype, device=device, requires_grad=True)
        self.probe = zero_leaf(*self.weight.shape, dtype=grad_dtype, device=device, requires_grad=False)
        self.stride, self.padding, self.dilation = conv.stride, conv.padding, conv.dilation

    def convolve(self, x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
        none = [0] * len(self.stride)
        return torch.ops.aten.convolution(x, kernel, bias, self.stride, self.padding, self.dilation, False, none, 1)

    def gradients(self, grad_output: Tensor, x: Tensor, kernel: Tensor, which: int) -> Tensor:
        """The gradient of ``x`` (``which`` 0) or of a kernel of ``kernel``'s shape (1)."""
        none = [0] * len(self.stride)
        mask = [which == 0, which == 1, False]
        settings = (None, self.stride, self.padding, self.dilation, False, none, 1, mask)
        return torch.ops.aten.convolution_backward(grad_output, x, kernel, *settings)[which]

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (n, in, …), with a batch dimension; computes in its dtype."""
        return _DeltaConv.apply(x, self.weight, self.bias, self.delta, self.probe, self)


def side_ranks(rank: int | None, out: int, channels: int, block: int) -> tuple[int, int]:
    """(r₁, r₂) of a kernel of ``block`` positions. Its unfoldings (out, in · k) and (in, out · k) have no more singular
    vectors than their shorter side: four output channels of 64 leave four directions of the 64. ``rank`` None: all."""
    if rank is None:
        return out, channels
    return min(rank, out, channels * block), min(rank, channels, out * block)


def problem(conv: nn.Module) -> str | None:
    """Why ``conv`` cannot become a :class:`LowRankConv`; None if it can."""
    if type(conv) not in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        return f"a {type(conv).__name__}, whose forward may differ"
    if conv.groups != 1:
        return f"it has {conv.groups} groups"
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return f"its padding is {conv.padding_mode} {conv.padding!r}; numbers of zeros are converted"
    return None if conv.weight.requires_grad else "its weight is frozen"
