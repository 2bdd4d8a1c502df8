"""A linear layer whose weight is stored, not trained, beside a zero leaf Δ whose gradient is the projected gradient.

    Y = X (W + L Δ R̂ᵀ)ᵀ at Δ = 0,   so   dL/dΔ = (dY L)ᵀ (X R̂),

with L, R̂ a basis or the identity: GaLore's R = Lᵀ G R̂ without ever forming G = dYᵀX. In a step whose subspace is
refreshed the second leaf, ``probe`` (out, in), requires grad instead and receives G itself.
Both leaves are one zero, expanded: they own no memory. ``docs/method.md`` derives this.
"""

import copy

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...parallel import shards
from ...quant.int8 import quantize
from ..subspace import sides
from .bases import Basis
from .delta_linear import delta_linear, stored_weight
from .guard import Guard
from .product_choice import Products
from .stored import StoredWeight

CODES = "weight_int8"  # a name for int8 codes in a state dict that is not that of ordinary weights


def zero_leaf(*shape: int, dtype: torch.dtype, device: torch.device, requires_grad: bool) -> nn.Parameter:
    return nn.Parameter(torch.zeros((), dtype=dtype, device=device).expand(*shape), requires_grad=requires_grad)


class LowRankLinear(nn.Module):
    """Replacement for ``nn.Linear`` (and transformers' ``Conv1D``) with GaLore's gradient as ``delta.grad``.

    ``weight``: (out, in), int8 with ``weight_scale`` bf16 (out, in / group_size), or floating point with
    ``weight_scale`` None; it never requires grad (:class:`StoredWeight`). ``left`` / ``right``: :class:`Basis` or None
    (identity).
    ``delta``: (r or out, r or in) and ``probe``: (out, in), zero leaves of dtype ``grad_dtype``. Computes in x's dtype;
    with ``products``, on integers while training proves that close enough.
    With a ``max_rank`` the rank is free to move up to it (see ``ranks``), from ``mean_rank``; both are None otherwise.
    """

    weight: nn.Parameter
    weight_scale: Tensor | None
    bias: nn.Parameter | None
    left: Basis | None
    right: Basis | None
    rank: int | None
    products: Products | None = None
    # Whether nobody reads the output's values now, only its gradient (see ``steps.unread``): it is zeros then.
    unread: bool = False
    # The name of int8 codes in a state dict. qgalore.convert gives one that no other reader takes for weights.
    code_key = "weight"
    # The rows of each of the matrices that it holds, where an optimizer looked for them (rules.fused).
    row_parts: tuple[int, ...] | None = None
    # Stated here too, for kinds with a constructor of their own.
    max_rank: int | None = None
    mean_rank: int | None = None
    guard: Guard | None = None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        rank: int | None,
        proj_type: str = "std",
        basis_format: str = "int4",
        group_size: int | None = None,
        grad_dtype: torch.dtype = torch.float32,
        transposed: bool = False,
        max_rank: int | None = None,
    ) -> None:
        """``weight`` (out, in) float; ``rank`` None means no projection; ``group_size`` None keeps the weight as it is;
        ``transposed`` records that the layer it replaces stores (in, out), for export."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.rank, self.transposed = rank, transposed
        self.max_rank, self.mean_rank = max_rank, None if max_rank is None else rank
        device = weight.device
        left = right = None
        if rank is not None:
            on_left, on_right = sides.basis_sides(self.out_features, self.in_features, proj_type)
            left = Basis(self.out_features, rank, basis_format, device) if on_left else None
            right = Basis(self.in_features, rank, basis_format, device) if on_right else None
        scale = None
        if group_size is not None:
            weight, scale = quantize(weight.detach(), group_size)
        self.weight = StoredWeight(weight.detach()).owned_by(self)
        self.register_buffer("weight_scale", scale)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach()))
        self.left, self.right = left, right
        self.basis_format = basis_format
        self.delta = zero_leaf(*self.delta_shape(), dtype=grad_dtype, device=device, requires_grad=True)
        self.probe = zero_leaf(*self.weight.shape, dtype=grad_dtype, device=device, requires_grad=False)

    def delta_shape(self, rank: int | None = None) -> torch.Size:
        """Δ's shape at ``rank``, by default the present one."""
        rows, columns = self.out_features, self.in_features
        if self.left is not None:
            rows = self.left.rank if rank is None else rank
        if self.right is not None:
            columns = self.right.rank if rank is None else rank
        return torch.Size((rows, columns))

    def set_rank(self, rank: int) -> None:
        """Give the bases, which are then unset, and Δ, which keeps its identity and hooks, the shapes of ``rank``."""
        for side in (self.left, self.right):
            if side is not None:
                side.resize(rank)
        self.rank = rank
        self.delta.grad = None
        # New data rather than a new parameter: optimizers and hooks hold on to the parameter.
        self.delta.data = self.delta.new_zeros(()).expand(self.delta_shape())

    def fit(self, shapes: dict[str, torch.Size], prefix: str) -> None:
        """Take the rank of the bases in a file of tensors of these ``shapes``, where the rank is free to move."""
        for side in ("left", "right"):
            stored = shapes.get(f"{prefix}{side}.codes")
            if self.max_rank is not None and stored and stored[0] != self.rank and stored[0] <= self.max_rank:
                self.set_rank(stored[0])

    def columns(self) -> tuple[Tensor | None, Tensor | None]:
        """The stored bases (L, R̂) as fp32 (dim, rank), None for the identity."""
        left = None if self.left is None else self.left.columns()
        right = None if self.right is None else self.right.columns()
        return left, right

    @torch.no_grad()
    def store(self, first: int, rows: Tensor) -> None:
        """Set the weight's rows from ``first`` on to ``rows`` (n, in), any float dtype.

        Raises ``ValueError`` if they are to be int8 and a value is not finite.
        """
        # Other processes may hold the rest of the rows.
        first, rows = shards.overlap(self.weight, first, rows)
        part = slice(first, first + rows.shape[0])
        if self.weight_scale is None:
            shards.local(self.weight)[part] = rows
            return
        q, scale = quantize(rows.to(self.weight.device), self.in_features // self.weight_scale.shape[1])
        shards.local(self.weight)[part] = q
        shards.local(self.weight_scale)[part] = scale

    def dense_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The stored weight (out, in) in ``dtype``."""
        return stored_weight(self.weight.detach(), self.weight_scale, dtype)

    def operands(self) -> tuple:
        """What the autograd functions compute with: weight, its scale, bias, codes and scale of the left and of the
        right basis, Δ, probe, basis format; None for what is not there."""
        stored = []
        for side in (self.left, self.right):
            stored += [None, None] if side is None else [side.codes, side.scale]
        constant = (self.weight, self.weight_scale, self.bias, *stored)
        return (*constant, self.delta, self.probe, self.basis_format)

    def forward(self, x: Tensor) -> Tensor:
        return delta_linear(x, self.operands(), self.products, self.unread)

    def leaves(self) -> dict[str, nn.Parameter]:
        """The zero leaves by name: memoryless, neither stored nor counted as weights."""
        return {"delta": self.delta, "probe": self.probe}

    def set_guard(self, guard: Guard) -> None:
        """Let ``guard`` hear of every gradient that comes to a leaf."""
        self.guard = guard
        for leaf in self.leaves().values():
            listens = leaf.requires_grad
            leaf.requires_grad_(True).register_post_accumulate_grad_hook(guard)  # which needs it, as in an optimizer
            leaf.requires_grad_(listens)

    def _apply(self, fn, recurse: bool = True):
        """Move or cast everything but the leaves, which are made anew: moving an expanded tensor would fill it in."""
        leaves = self.leaves()
        for name in leaves:
            del self._parameters[name]
        super()._apply(fn, recurse)
        for name, leaf in leaves.items():
            leaf.data = torch.zeros((), dtype=leaf.dtype, device=self.weight.device).expand(leaf.shape)
            self._parameters[name] = leaf
        return self

    def __deepcopy__(self, memo: dict) -> "LowRankLinear":
        """A copy whose leaves own no memory either: copying an expanded tensor would fill it in."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        for leaf in self.leaves().values():
            blank = torch.zeros((), dtype=leaf.dtype, device=leaf.device).expand(leaf.shape)
            memo[id(leaf)] = nn.Parameter(blank, requires_grad=leaf.requires_grad)
        twin.__setstate__(copy.deepcopy(self.__dict__, memo))
        return twin

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if isinstance(self.weight, StoredWeight):
            self.weight.owned_by(self)
        if self.guard is not None:  # the leaves are new ones, without hooks
            self.set_guard(self.guard)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.leaves():
            del destination[prefix + name]
        if self.weight_scale is not None:
            destination[prefix + self.code_key] = destination.pop(prefix + "weight")

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
        self.fit({name: value.shape for name, value in state_dict.items() if name.startswith(prefix)}, prefix)
        if prefix + CODES in state_dict:
            state_dict[prefix + "weight"] = state_dict.pop(prefix + CODES)
        found = state_dict.get(prefix + "weight")
        if found is not None and (found.dtype == torch.int8) != (self.weight.dtype == torch.int8):
            # copying would round floats to integers, or take integers for weights, without a word
            errors.append(
                f"{prefix}weight is {found.dtype} in the file, {self.weight.dtype} in the model: load floating-point "
                "weights before qgalore.convert, and a converted model's after a qgalore.convert with the same options"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        missing[:] = [key for key in missing if key not in {prefix + name for name in self.leaves()}]

    def _replicate_for_data_parallel(self):
        raise ConfigError(
            "nn.DataParallel copies Δ and the full-gradient probe to every device and adds gradients up behind the "
            "optimizer's back; train on one device (CUDA_VISIBLE_DEVICES=0), or on several with torchrun train.py"
        )

    def extra_repr(self) -> str:
        kind = "int8" if self.weight_scale is not None else str(self.weight.dtype).removeprefix("torch.")
        return f"in={self.in_features}, out={self.out_features}, rank={self.rank}, weight={kind}"
