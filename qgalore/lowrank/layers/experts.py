"""A mixture's experts, each with low-rank layers of its own: one basis, one schedule, one slot for every matrix.

transformers 5 keeps the experts of a layer in two tensors, ``gate_up_proj`` (E, 2·ff, hidden) and ``down_proj``
(E, hidden, ff). Their gradients have three dimensions, but are batches of matrices, for an expert's tokens touch its
own slice alone: each slice is projected by itself.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .linear import LowRankLinear

NAMES = ("gate_up_proj", "down_proj")


class _Idle(torch.autograd.Function):
    """No rows, (0, n) → (0, n), in the place of an expert without tokens: calls ``tell`` in the backward pass when its
    gradients would come, which is the same place in every process, whoever has tokens for it."""

    @staticmethod
    def forward(ctx, rows: Tensor, tell: Callable[[], None]) -> Tensor:
        ctx.tell = tell
        return rows.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[None, None]:
        ctx.tell()
        return None, None


class Experts(nn.Module):
    """Replacement for an experts module of transformers, with the same arguments and result.

    ``gate_up_proj`` and ``down_proj``: E :class:`LowRankLinear` (or, unconverted, linear) layers (2·ff, hidden) and
    (hidden, ff). ``gating``: the module replaced, without its weights, whose ``_apply_gate`` (rows, 2·ff) → (rows, ff)
    it calls. Rows are sorted by expert and brought back before they are summed: nothing is added up in an order that
    threads decide, so that a resumed run has the same bits.

    ``tell_idle``, where several processes train: called inside backward with the layers of each expert that got no
    token here, in the order in which their gradients would have come.
    """

    gating: Any  # some module of transformers
    tell_idle: Callable[[Sequence[nn.Module]], None] | None = None

    def __init__(self, gating: nn.Module, gate_up_proj: list[nn.Module], down_proj: list[nn.Module]) -> None:
        super().__init__()
        self.gating = gating
        self.gate_up_proj, self.down_proj = nn.ModuleList(gate_up_proj), nn.ModuleList(down_proj)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``hidden_states`` (tokens, hidden); ``top_k_index`` int64 and ``top_k_weights`` (tokens, k): the experts of
        each token and their shares. Returns (tokens, hidden), summed in the weights' dtype and rounded once."""
        tokens, chosen = top_k_index.shape
        order, sizes = self._by_expert(top_k_index.reshape(-1))
        repeated = hidden_states.unsqueeze(1).expand(-1, chosen, -1).reshape(tokens * chosen, -1)
        tell = self.tell_idle if torch.is_grad_enabled() else None
        outputs = []
        for rows, gate_up, down in zip(
            repeated.index_select(0, order).split(sizes), self.gate_up_proj, self.down_proj, strict=True
        ):
            # An expert without tokens gets no gradient, rather than one of zeros, which would age its moments.
            if len(rows):
                outputs.append(down(self.gating._apply_gate(gate_up(rows))))
            elif tell is not None:
                nothing = hidden_states.new_empty(0, hidden_states.shape[1], requires_grad=True)
                outputs.append(_Idle.apply(nothing, partial(tell, (down, gate_up))))
        # Under autocast an empty stand-in keeps the dtype of its input, which must not decide.
        dtype = next(rows.dtype for rows in outputs if len(rows))
        outputs = [rows.to(dtype) for rows in outputs]
        # The inverse permutation brings every row back to its token.
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        found = torch.cat(outputs).index_select(0, back).view(tokens, chosen, -1)
        return (found * top_k_weights.unsqueeze(-1)).sum(1).to(hidden_states.dtype)

    def _by_expert(self, chosen: Tensor) -> tuple[Tensor, list[int]]:
        """The permutation that sorts ``chosen`` (rows) by expert, and each expert's number of rows. The meta device,
        where plans are made, knows no values: the rows are spread evenly there."""
        experts, rows = len(self.down_proj), len(chosen)
        if chosen.is_meta:
            return torch.empty_like(chosen), [rows * (e + 1) // experts - rows * e // experts for e in range(experts)]
        return chosen.argsort(stable=True), self.rows_of_each(chosen, experts).tolist()

    @staticmethod
    def rows_of_each(chosen: Tensor, experts: int) -> Tensor:
        """How often each of ``experts`` is in ``chosen`` (rows) int64: int64 (experts,). ``torch.bincount`` would make
        a GPU wait twice, for the smallest and the largest value."""
        return chosen.new_zeros(experts).scatter_add_(0, chosen, torch.ones_like(chosen))

    def stacked(self, name: str, dtype: torch.dtype) -> Tensor:
        """``gate_up_proj`` or ``down_proj`` as one tensor (E, out, in) in ``dtype``, as transformers keeps it."""
        return torch.stack([layer.dense_weight().to(dtype).cpu() for layer in getattr(self, name)])

    @torch.no_grad()
    def store(self, name: str, first: int, rows: Tensor) -> None:
        """Set rows from ``first`` on, of all experts' matrices one below the other, to ``rows`` (n, in), any float
        dtype. Raises ``ValueError`` if they are to be int8 and a value is not finite."""
        layers: list[LowRankLinear] = list(getattr(self, name))
        height, last = layers[0].out_features, first + len(rows)
        for number in range(first // height, (last - 1) // height + 1):
            low, high = max(first, number * height), min(last, (number + 1) * height)
            layers[number].store(low - number * height, rows[low - first : high - first])


def problem(module: nn.Module) -> str | None:
    """Why ``module``, which has tensors of three dimensions, is not one of experts that :class:`Experts` can replace;
    None if it is. transformers marks its experts with what their forward does."""
    tensors = dict(module.named_parameters()) if set(module._parameters) == set(NAMES) else {}
    if len(tensors) != 2 or any(p.ndim != 3 for p in tensors.values()) or not hasattr(module, "_apply_gate"):
        return f"a {type(module).__name__} is not an experts module of {' and '.join(NAMES)} alone"
    wanted = {"has_gate": True, "has_bias": False, "is_transposed": False, "has_post_expert_norm": False}
    for name, value in wanted.items():
        # transformers before 5.18 knows no norm behind the experts, and has no mark for it
        found = getattr(module, name, False if name == "has_post_expert_norm" else None)
        if found is not value:
            return f"a {type(module).__name__} has {name}={found}"
    if not all(p.requires_grad for p in tensors.values()):
        return "a part of its experts is frozen"
    return None
