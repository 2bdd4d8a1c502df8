"""An embedding whose weight is stored, not trained, beside a leaf Δ, and a head that shares it.

With one-hot rows E (T, V) the embedding is X = E (W + L Δ R̂ᵀ), so that G = Eᵀ dX and dL/dΔ = (E L)ᵀ (dX R̂): the sum
over the tokens of each id of dX R̂, r wide. The (V, d) gradient is formed only for the probe.
"""

import torch
from torch import Tensor, nn

from ...quant import dispatch
from ..subspace.sides import TILE_ELEMENTS
from .delta_linear import delta_linear, stored_weight
from .linear import LowRankLinear


def _sum_by_id(values: Tensor, ids: Tensor, rows: int, padding: int, dtype: torch.dtype) -> Tensor:
    """Eᵀ ``values``: (rows, k) in ``dtype`` from (T, k), summed in fp32; nothing arrives at row ``padding`` (−1: none).

    PyTorch's own kernel for embeddings, because ``index_add_`` on a GPU sums in another order in every run.
    """
    scatter = torch.ops.aten.embedding_dense_backward
    if dtype == torch.float32:
        return scatter(values.to(dtype), ids, rows, padding, False)
    # The kernel sums in its own dtype. In tiles of columns its fp32 table stays small beside the result.
    total = values.new_empty(rows, values.shape[1], dtype=dtype)
    step = max(1, TILE_ELEMENTS // rows)
    for a in range(0, values.shape[1], step):
        total[:, a : a + step] = scatter(values[:, a : a + step].to(torch.float32), ids, rows, padding, False)
    return total


class _DeltaEmbedding(torch.autograd.Function):
    """Rows of the stored weight; backward gives whichever of dΔ, dprobe is asked for."""

    @staticmethod
    def forward(
        ctx, ids, dtype, padding, weight, weight_scale, bias, left, left_scale, right, right_scale, delta, probe, fmt
    ):
        ctx.save_for_backward(ids, left, left_scale, right, right_scale)
        ctx.shape, ctx.padding, ctx.leaf_dtype, ctx.fmt = weight.shape, padding, delta.dtype, fmt
        flat = ids.reshape(-1)
        # index_select refuses negative ids, which weight[flat] would count from the end.
        scale = None if weight_scale is None else weight_scale.index_select(0, flat)
        return stored_weight(weight.index_select(0, flat), scale, dtype).view(*ids.shape, weight.shape[1])

    @staticmethod
    def backward(ctx, grad_output):
        ids, left, left_scale, right, right_scale = ctx.saved_tensors
        rows, width = ctx.shape
        ids = ids.reshape(-1)
        columns = grad_output.reshape(-1, width)
        grad_delta = grad_probe = None
        if ctx.needs_input_grad[11]:
            grad_probe = _sum_by_id(columns, ids, rows, ctx.padding, ctx.leaf_dtype)
        # Each token's gradient is projected before the sum over tokens, so that the sum is r wide.
        if ctx.needs_input_grad[10]:
            if right is not None:
                columns = columns @ dispatch.decode(right, right_scale, width, ctx.fmt, columns.dtype).T
            if left is None:
                grad_delta = _sum_by_id(columns, ids, rows, ctx.padding, ctx.leaf_dtype)
            else:
                # Eᵀ L is a choice of L's rows, one for each token.
                picked = dispatch.decode(left, left_scale, rows, ctx.fmt, columns.dtype).index_select(1, ids)
                grad_delta = (picked @ columns).to(ctx.leaf_dtype)
        return *[None] * 10, grad_delta, grad_probe, None


class LowRankEmbedding(LowRankLinear):
    """Replacement for ``nn.Embedding`` with GaLore's gradient as ``delta.grad``; storage and leaves are those of a
    :class:`LowRankLinear` of weight (V, d). Maps ids (…) to vectors (…, d) in ``dtype``, which follows ``to()``."""

    def __init__(
        self,
        weight: Tensor,
        bias: None = None,
        *,
        dtype: torch.dtype | None = None,
        padding_idx: int | None = None,
        **options,
    ) -> None:
        """``dtype``: of the output, by default the weight's; ``padding_idx``: a row that gets no gradient, as in
        ``nn.Embedding``; the rest as for :class:`LowRankLinear`. Raises ``ValueError`` for a padding row together with
        a basis on the vocabulary, which would move all rows, and for a ``bias``."""
        if bias is not None:
            raise ValueError("an embedding has no bias")
        super().__init__(weight, None, **options)
        if padding_idx is not None and self.left is not None:
            raise ValueError(
                f"padding_idx {padding_idx} names a frozen row, which a basis on the vocabulary's side would move; set "
                "the embedding's padding_idx to None, or proj_type to right"
            )
        self.dtype = weight.dtype if dtype is None else dtype
        self.padding_idx = padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        padding = -1 if self.padding_idx is None else self.padding_idx
        return _DeltaEmbedding.apply(ids, self.dtype, padding, *self.operands())

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        return self

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{super().extra_repr()}, dtype={str(self.dtype).removeprefix('torch.')}{padding}"


class TiedHead(nn.Module):
    """An output head of a :class:`LowRankEmbedding`'s own weight and leaves, so that Δ receives the gradient of both.

    The embedding is not a submodule: its tensors have one owner, one name in a state dict and one optimizer slot. Only
    a ``bias`` (V,), or None, belongs to the head.
    """

    embedding: LowRankEmbedding
    bias: nn.Parameter | None

    def __init__(self, embedding: LowRankEmbedding, bias: Tensor | None = None) -> None:
        super().__init__()
        # Put past nn.Module, which would register it a second time.
        self.__dict__["embedding"] = embedding
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach()))

    @property
    def weight(self) -> nn.Parameter:
        """The embedding's stored weight (V, d)."""
        return self.embedding.weight

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As ever, but for what transformers' ``tie_weights`` does: assigning the embedding's weight, already there."""
        if name == "weight" and param is self.embedding.weight:
            return
        super().register_parameter(name, param)

    def operands(self) -> tuple:
        """Those of the embedding, with the head's bias: see :meth:`LowRankLinear.operands`."""
        weight, scale, _, *rest = self.embedding.operands()
        return (weight, scale, self.bias, *rest)

    def forward(self, x: Tensor) -> Tensor:
        return delta_linear(x, self.operands())

    def extra_repr(self) -> str:
        return f"of the embedding: {self.embedding.extra_repr()}"
