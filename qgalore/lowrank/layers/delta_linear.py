"""The product with a stored weight, and the gradients of Δ and of the probe that come from it.

    Y = X (W + L Δ R̂ᵀ)ᵀ at Δ = 0,   so   dL/dΔ = (dY L)ᵀ (X R̂).

A float copy of W lives only inside each call. See ``linear`` for the layer that holds these operands.
"""

import torch
from torch import Tensor, nn

from ...quant import dispatch, int8_products
from .product_choice import Choice, Products


def stored_weight(weight: Tensor, scale: Tensor | None, dtype: torch.dtype, after: Tensor | None = None) -> Tensor:
    """A stored weight, or some rows of it, in ``dtype``; ``scale`` is None for one that is not int8. ``after``: see
    ``dispatch.dequantize_after``."""
    if scale is None:
        return weight.to(dtype)
    if after is None:
        return dispatch.dequantize(weight, scale, dtype)
    return dispatch.dequantize_after(weight, scale, dtype, after)


def _output(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """Y = X Wᵀ + b in x's dtype."""
    return nn.functional.linear(x, stored_weight(weight, scale, x.dtype, x), None if bias is None else bias.to(x.dtype))


def _zeros(x: Tensor, weight: Tensor, *_: Tensor | None) -> Tensor:
    """In the place of an output that nobody reads."""
    return x.new_zeros(*x.shape[:-1], weight.shape[0])


def _input_gradient(
    grad_output: Tensor, weight: Tensor, scale: Tensor | None, dtype: torch.dtype, int8: bool | Choice
) -> Tensor:
    """dX = dY W in ``dtype``; ``int8``: whether on integers, or how to find that out."""

    def floating() -> Tensor:
        return grad_output @ stored_weight(weight, scale, dtype, grad_output)

    def integers() -> Tensor:
        assert scale is not None, "only an int8 weight is multiplied as integers"
        return int8_products.input_gradient(grad_output, weight, scale, dtype)

    if isinstance(int8, Choice):
        int8.settle(floating, integers)
        return integers() if int8.int8 else floating()
    return integers() if int8 else floating()


class _DeltaLinear(torch.autograd.Function):
    """Y = X Wᵀ + b; backward gives dX, db and whichever of dΔ, dprobe is asked for. A float W lives only inside each
    call. ``multiply``: of x, weight, its scale and bias, the output. ``int8``: whether dX is a product of integers, or
    how to find that out."""

    @staticmethod
    def forward(
        ctx, x, weight, weight_scale, bias, left, left_scale, right, right_scale, delta, probe, fmt, multiply, int8
    ):
        ctx.save_for_backward(x, weight, weight_scale, left, left_scale, right, right_scale)
        ctx.fmt = fmt
        ctx.delta_dtype = delta.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.int8_gradient = int8
        return multiply(x, weight, weight_scale, bias)

    @staticmethod
    def backward(ctx, grad_output):
        x, weight, weight_scale, left, left_scale, right, right_scale = ctx.saved_tensors
        grad_x = grad_bias = grad_delta = grad_probe = None
        if ctx.needs_input_grad[0]:
            grad_x = _input_gradient(grad_output, weight, weight_scale, x.dtype, ctx.int8_gradient)

        # From here on every token is a row, whatever dimensions the batch has.
        rows = grad_output.reshape(-1, grad_output.shape[-1])
        columns = x.reshape(-1, x.shape[-1])
        # Summed in fp32 and rounded once.
        if ctx.needs_input_grad[3]:
            grad_bias = rows.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        # The probe's gradient is the whole one, dYᵀ X. It is asked for only where a basis is due.
        if ctx.needs_input_grad[9]:
            grad_probe = (rows.T @ columns).to(ctx.delta_dtype)
        # Δ's gradient is (dY L)ᵀ (X R̂). Projecting the two factors first is what keeps G from being formed.
        if ctx.needs_input_grad[8]:
            if left is not None:
                rows = rows @ dispatch.decode(left, left_scale, weight.shape[0], ctx.fmt, x.dtype).T
            if right is not None:
                columns = columns @ dispatch.decode(right, right_scale, weight.shape[1], ctx.fmt, x.dtype).T
            grad_delta = (rows.T @ columns).to(ctx.delta_dtype)
        return grad_x, None, None, grad_bias, None, None, None, None, grad_delta, grad_probe, None, None, None


def delta_linear(x: Tensor, operands: tuple, products: Products | None = None, unread: bool = False) -> Tensor:
    """Y = X Wᵀ + b for :meth:`LowRankLinear.operands`, in x's dtype, or autocast's. ``products``: which of the products
    with W run on integers; None for neither. A trial of them that is due is made if gradients are wanted. ``unread``:
    return zeros, with the gradients of Y."""
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if products is None:
        return _DeltaLinear.apply(x, *operands, _zeros if unread else _output, False)
    # Whether a product of integers is close enough was measured before, or is measured on this batch. A pass without
    # gradients measures nothing.
    output, gradient = products.output, products.gradient
    if products.due and torch.is_grad_enabled():
        if output.due and not unread:
            stored = operands[:3]
            output.settle(lambda: _output(x, *stored), lambda: int8_products.output(x, *stored))
        # A first layer, whose input needs no gradient, has no second product to try.
        gradient.due &= x.requires_grad
    multiply = int8_products.output if output.int8 else _output
    int8 = gradient if gradient.due else bool(gradient.int8)
    return _DeltaLinear.apply(x, *operands, _zeros if unread else multiply, int8)
