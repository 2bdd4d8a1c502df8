"""Cross entropy from hidden states and an output head, without a tokens × vocabulary tensor.

Logits are made for one block of the vocabulary at a time: a running log-sum-exp and the target's logit are all that
the loss needs, and the backward pass makes each block again. Algebra: p = softmax(h Wᵀ + b) − onehot(label), so that
dL/dh = p W, dL/dW = pᵀ h, and for a low-rank head dL/dΔ = (p L)ᵀ (h R̂).

Memory at the peak, in the backward pass, with T tokens of width d in bf16, a vocabulary V and B = ``limit`` elements:
h itself (2 T d bytes) and its gradient in fp32 (4 T d; another 2 T d when it is rounded); one block of logits in bf16
and fp32 and p in bf16 (8 B; on a GPU 128 MiB by default); one block of W (2 d B / T); the gradient of whichever leaf
asks for it: V × r for Δ, V × d for the probe or a dense weight; a decoded left basis (2 V r) and p L (4 T r) if there
is one.
The whole logits would cost 2 T V for bf16 and 8 T V for the fp32 log-softmax and its gradient.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...quant import dispatch
from ...quant.int8 import kind_of
from .delta_linear import stored_weight
from .embedding import TiedHead
from .linear import LowRankLinear

BLOCK_ELEMENTS = 1 << 24
# 8 MiB of fp32. The C allocator keeps blocks of this size, and fetches larger ones from the system each time.
CPU_BLOCK_ELEMENTS = 1 << 21


def block_elements(device: torch.device) -> int:
    """The default ``limit`` of :func:`chunked_cross_entropy` on ``device``."""
    return min(BLOCK_ELEMENTS, CPU_BLOCK_ELEMENTS) if kind_of(device) == "cpu" else BLOCK_ELEMENTS


def accepts(head: nn.Module | None) -> bool:
    """Whether ``head`` is one that :func:`chunked_cross_entropy` knows; a subclass of ``nn.Linear`` may differ."""
    return type(head) is nn.Linear or isinstance(head, LowRankLinear | TiedHead)


def vocabulary_blocks(tokens: int, vocabulary: int, limit: int) -> list[tuple[int, int]]:
    """(a, b) of consecutive blocks with tokens · (b − a) ≤ ``limit``, a multiple of 64 wide where that allows it."""
    size = max(1, limit // max(1, tokens))
    size -= size % 64 if size >= 64 else 0
    return [(start, min(start + size, vocabulary)) for start in range(0, vocabulary, size)]


def chunked_cross_entropy(
    hidden: Tensor, head: nn.Module, labels: Tensor, *, ignored: int = -100, limit: int | None = None
) -> Tensor:
    """Cross entropy in nats, an fp32 scalar, summed over the labels other than ``ignored``.

    ``hidden``: (T, d) floating point, in whose dtype (autocast's under autocast) the logits are computed; they are
    fp32 from there on. ``labels``: (T,) int64. ``head``: an ``nn.Linear``, :class:`LowRankLinear` or :class:`TiedHead`
    of V rows, with or without a bias; each of its leaves that requires grad gets one, once. ``limit``: elements of a
    block of logits, by default :func:`block_elements`.

    If every label is ignored the loss is 0 and so are all gradients. A label outside [0, V) makes the loss nan: raising
    would make a GPU wait. Raises ``TypeError`` for another kind of head.
    """
    if not accepts(head):
        raise TypeError(f"the head is a {type(head).__name__}; the chunked loss knows nn.Linear and low-rank heads")
    if not hidden.is_meta and torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    limit = block_elements(hidden.device) if limit is None else limit
    low_rank = isinstance(head, LowRankLinear | TiedHead)
    operands = head.operands() if low_rank else (head.weight, None, head.bias, *[None] * 7)
    return _ChunkedCrossEntropy.apply(hidden, labels, ignored, limit, *operands)


def _block(hidden: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, a: int, b: int):
    """Rows a … b−1 of the weight in hidden's dtype, and their logits (T, b − a) in fp32, free to be overwritten."""
    dense = stored_weight(weight[a:b], None if scale is None else scale[a:b], hidden.dtype)
    logits = nn.functional.linear(hidden, dense, None if bias is None else bias[a:b].to(hidden.dtype))
    return dense, logits.to(torch.float32)


def _inside(labels: Tensor, a: int, b: int) -> tuple[Tensor, Tensor]:
    """(T, 1) column of each label in the block, clamped into it, and whether it lies there."""
    column = (labels - a).unsqueeze(1)
    clamped = column.clamp(0, b - a - 1)
    return clamped, column == clamped


def _residual(logits: Tensor, labels: Tensor, lse: Tensor, factor: Tensor, a: int, b: int) -> Tensor:
    """``factor · (softmax − onehot)`` for a block, in place."""
    column, inside = _inside(labels, a, b)
    probability = logits.sub_(lse.unsqueeze(1)).exp_()
    probability.scatter_add_(1, column, inside.to(torch.float32).neg_())
    return probability.mul_(factor.unsqueeze(1))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right`` with an fp32 ``total`` and factors of any one dtype; unrounded where the device can."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        total += torch.mm(left, right, out_dtype=total.dtype)
    else:
        # Each block's product is rounded to the factors' dtype, and their sum is not.
        total += left @ right


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The operands after ``limit`` are those of ``LowRankLinear.operands``; an ``nn.Linear`` has only the first three
    that are not None, and is the one case in which ``weight`` itself may require grad."""

    @staticmethod
    def forward(
        ctx, hidden, labels, ignored, limit,
        weight, scale, bias, left, left_scale, right, right_scale, delta, probe, fmt,
    ):  # fmt: skip
        tokens = hidden.shape[0]
        peak = torch.full((tokens,), -torch.inf, device=hidden.device)
        total = torch.zeros(tokens, device=hidden.device)
        target = torch.full((tokens,), torch.nan, device=hidden.device)
        blocks = vocabulary_blocks(tokens, weight.shape[0], limit)
        # A running log-sum-exp. ``peak`` is the largest logit so far, and ``total`` the sum of exp(logit − peak). When
        # a block has a larger logit, the sum so far is scaled down to it, so that no exponential overflows.
        for a, b in blocks:
            logits = _block(hidden, weight, scale, bias, a, b)[1]
            column, inside = _inside(labels, a, b)
            target = torch.where(inside, logits.gather(1, column), target.unsqueeze(1)).squeeze(1)
            higher = torch.maximum(peak, logits.amax(1))
            total = total * (peak - higher).exp_() + logits.sub_(higher.unsqueeze(1)).exp_().sum(1)
            peak = higher
        lse = peak + total.log_()
        ctx.save_for_backward(hidden, labels, lse, weight, scale, bias, left, left_scale, right, right_scale)
        ctx.blocks, ctx.ignored, ctx.fmt = blocks, ignored, fmt
        ctx.leaf_dtype = None if delta is None else delta.dtype
        return torch.where(labels != ignored, lse - target, 0.0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        hidden, labels, lse, weight, scale, bias, left, left_scale, right, right_scale = ctx.saved_tensors
        for_hidden, for_weight, for_bias, for_delta, for_probe = (ctx.needs_input_grad[i] for i in (0, 4, 6, 11, 12))
        # Projected once, for all blocks: hidden is the same in each.
        columns = hidden
        if for_delta and right is not None:
            columns = hidden @ dispatch.decode(right, right_scale, weight.shape[1], ctx.fmt, hidden.dtype).T

        full_dtype = weight.dtype if for_weight else ctx.leaf_dtype
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if for_hidden else None
        grad_full = torch.empty_like(weight, dtype=full_dtype) if for_weight or for_probe else None
        grad_bias = torch.empty_like(bias) if for_bias else None
        # With a basis on the vocabulary, p L is a sum over blocks and Δ's gradient follows from it at the end. Without
        # one, each block gives its own rows of Δ's gradient.
        grad_delta = rows = None
        if for_delta and left is not None:
            left = dispatch.decode(left, left_scale, weight.shape[0], ctx.fmt, hidden.dtype).T
            rows = hidden.new_zeros(hidden.shape[0], left.shape[1], dtype=torch.float32)
        elif for_delta:
            grad_delta = columns.new_empty(weight.shape[0], columns.shape[1], dtype=ctx.leaf_dtype)

        # Ignored labels have no loss, and their rows of p are zero.
        factor = torch.where(labels != ctx.ignored, grad_loss, 0.0)
        for a, b in ctx.blocks:
            dense, logits = _block(hidden, weight, scale, bias, a, b)
            p = _residual(logits, labels, lse, factor, a, b).to(hidden.dtype)
            if grad_hidden is not None:
                _add_product(grad_hidden, p, dense)
            if grad_full is not None:
                grad_full[a:b] = p.T @ hidden
            if grad_bias is not None:
                grad_bias[a:b] = p.sum(0, dtype=torch.float32)
            if rows is not None and left is not None:
                _add_product(rows, p, left[a:b])
            elif grad_delta is not None:
                grad_delta[a:b] = p.T @ columns
        if rows is not None:
            grad_delta = (rows.to(hidden.dtype).T @ columns).to(ctx.leaf_dtype)
        if grad_hidden is not None:
            grad_hidden = grad_hidden.to(hidden.dtype)
        grad_weight, grad_probe = (grad_full, None) if for_weight else (None, grad_full)
        return (
            grad_hidden, None, None, None, grad_weight, None, grad_bias, None, None, None, None,
            grad_delta, grad_probe, None,
        )  # fmt: skip
