"""Liger's kernels for RMSNorm, SwiGLU and rotary embeddings, as functions that autograd knows.

Each is one launch where PyTorch takes several. Some of Liger's kernels write over what they are given, which nobody
else may notice. So a norm's gradient has memory of its own, and queries and keys are copied before they are turned.
SwiGLU's backward pass writes over its two saved operands, which only it reads. PyTorch is told so, and a second
backward pass through them is an error.

On the meta device, where plans are made, nothing is launched, and the tensors have the sizes that they would have.
"""

from collections.abc import Iterable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

PROCESSORS = 128  # assumed of a card: the gradient of a norm's weight is first summed by each of them


@cache
def _of(module: str, name: str) -> Any:
    """What Liger calls so. Its import takes seconds."""
    return getattr(import_module(f"liger_kernel.ops.{module}"), name)


def launch_on_paper(read: Iterable[Tensor], written: Iterable[Tensor]) -> None:
    """A launch on tensors without values, of which nothing comes. ``speed`` counts what it would have moved."""


class RMSNorm(Function):
    """x / rms(x) · (offset + weight) over the last dimension, in x's dtype; ``casting``: where Liger rounds."""

    @staticmethod
    def forward(ctx, x, weight, eps, offset, casting):
        ctx.on_paper = x.is_meta
        if ctx.on_paper:
            y, rms = torch.empty_like(x), x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)
            launch_on_paper((x, weight), (y, rms))
            ctx.save_for_backward(x, weight, rms)
            return y
        return _of("rms_norm", "LigerRMSNormFunction").forward(ctx, x, weight, eps, offset, casting, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        if not ctx.on_paper:  # saved tensors may be asked for only once, where checkpointing makes them anew
            return (*_of("rms_norm", "LigerRMSNormFunction").backward(ctx, grad)[:2], None, None, None)
        x, weight, rms = ctx.saved_tensors
        dx, sums, dw = torch.zeros_like(grad), x.new_empty((PROCESSORS, x.shape[-1]), dtype=torch.float32), None
        trains = ctx.needs_input_grad[1]
        launch_on_paper((grad, x, weight, rms), (dx, sums) if trains else (dx,))
        if trains:
            dw = sums.sum(0).to(weight.dtype)
        return dx, dw, None, None, None


class SwiGLU(Function):
    """silu(gate) · up. The backward pass writes the gradients over both."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.on_paper = gate.is_meta
        if ctx.on_paper:
            ctx.save_for_backward(gate, up)
            y = torch.empty_like(gate)
            launch_on_paper((gate, up), (y,))
            return y
        return _of("swiglu", "LigerSiLUMulFunction").forward(ctx, gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        if ctx.on_paper:
            gate, up = ctx.saved_tensors
            launch_on_paper((grad, gate, up), (gate, up))
            return gate.detach(), up.detach()
        found = _of("swiglu", "LigerSiLUMulFunction").backward(ctx, grad)[:2]
        for overwritten in found:  # views of what was saved, which count their versions together
            increment_version(overwritten)
        return found


class FusedSwiGLU(Function):
    """:class:`SwiGLU` of one tensor that holds gate and up side by side."""

    @staticmethod
    def forward(ctx, both):
        ctx.on_paper = both.is_meta
        if ctx.on_paper:
            ctx.save_for_backward(both)
            y = both.new_empty((*both.shape[:-1], both.shape[-1] // 2))
            launch_on_paper((both,), (y,))
            return y
        return _of("swiglu", "LigerFusedGateUpSiLUMulFunction").forward(ctx, both, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        if ctx.on_paper:
            (both,) = ctx.saved_tensors
            found = torch.empty_like(both)
            launch_on_paper((grad, both), (found,))
            return found
        found = _of("swiglu", "LigerFusedGateUpSiLUMulFunction").backward(ctx, grad)[0]
        return found.view(*grad.shape[:-1], -1)


def _copied(values: Tensor) -> Tensor:
    """A copy of (rows, heads, tokens, size) that lies in memory as (rows, tokens, heads, size), as Liger wants it."""
    return values.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)


class Rotary(Function):
    """Queries and keys (rows, heads, tokens, size) turned by tables (1 or rows, tokens, turned size)."""

    @staticmethod
    def forward(ctx, q, k, cos, sin):
        q, k = _copied(q), _copied(k)
        if q.is_meta:
            ctx.save_for_backward(cos, sin)
            launch_on_paper((q, k, cos, sin), (q, k))
            return q, k
        return _of("rope", "LigerRopeFunction").forward(ctx, q, k, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk):
        dq, dk = _copied(dq), _copied(dk)
        if dq.is_meta:
            launch_on_paper((dq, dk, *ctx.saved_tensors), (dq, dk))
            return dq, dk, None, None
        return (*_of("rope", "LigerRopeFunction").backward(ctx, dq, dk)[:2], None, None)
