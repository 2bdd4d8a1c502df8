"""Which code works on a format: the plain PyTorch reference, or the Triton kernels where they apply.

The choice is one for the process, made by :func:`use`: ``reference``; ``auto``, kernels for tensors on a GPU if Triton
is installed and every kernel passes ``self_check`` there, else the reference and a printed line; or ``triton``, which
raises where a kernel cannot run. Code that ``torch.compile`` traces always takes the reference, which it fuses itself.
"""

import os
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from ..errors import ConfigError
from . import basis, dense, int8
from .self_check import first_failure

CHOICES = ("auto", "reference", "triton")
_choice = "auto"


def use(kernels: str, device: torch.device) -> None:
    """Choose the code for this process and, where it is kernels, check them on ``device``.

    Raises :class:`ConfigError` for a name that is not in ``CHOICES``, and under ``triton`` if kernels cannot run on
    ``device`` or one of them is wrong there.
    """
    global _choice
    if kernels not in CHOICES:
        raise ConfigError(f"kernels is {kernels!r}; it must be one of {CHOICES}")
    before, _choice = _choice, kernels
    try:
        kernels_for(device)
    except ConfigError:
        _choice = before
        raise


@cache
def _say_once(text: str) -> None:
    print(f"{'kernels:':<11}{text}", flush=True)


@cache
def _obstacle_on(device: torch.device) -> str | None:
    """Why no kernel can be used on ``device``, found once for each: nothing for a CPU under ``TRITON_INTERPRET``."""
    if find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"Triton does not run on {device.type}"
    from . import kernels as module

    return first_failure(module, device)


def kernels_for(device: torch.device, obstacle: str | None = None) -> ModuleType | None:
    """The module of kernels to use for tensors on ``device``, or None for the reference.

    ``obstacle`` says why this case has no kernel. Under ``triton`` whatever keeps a kernel from running raises
    :class:`ConfigError`; under ``auto`` it is printed, once.
    """
    if _choice == "reference" or device.type == "meta" or torch.compiler.is_compiling():
        return None
    if _choice == "auto" and device.type != "cuda":
        return None
    obstacle = _obstacle_on(device) or obstacle
    if obstacle is None:
        from . import kernels as module

        return module
    if _choice == "triton":
        raise ConfigError(f"kernels is 'triton', but {obstacle}; set kernels to auto or reference")
    _say_once(f"{obstacle}: plain PyTorch is used there")
    return None


def dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """See ``int8.dequantize``."""
    module = kernels_for(q.device)
    if module is None:
        return int8.dequantize(q, scale, dtype)
    return module.dequantize(q.contiguous(), scale.contiguous(), dtype)


@torch.library.custom_op("qgalore::dequantize", mutates_args=())
def _dequantize_opaque(q: Tensor, scale: Tensor, dtype: torch.dtype, after: Tensor) -> Tensor:
    return dequantize(q, scale, dtype)


@_dequantize_opaque.register_fake
def _(q: Tensor, scale: Tensor, dtype: torch.dtype, after: Tensor) -> Tensor:
    return torch.empty_like(q, dtype=dtype)


def dequantize_after(q: Tensor, scale: Tensor, dtype: torch.dtype, after: Tensor) -> Tensor:
    """:func:`dequantize`, in compiled code not before ``after`` is there. There forward and backward are one graph, in
    which equal calls become one: the float weight would be kept from the one to the other."""
    if not torch.compiler.is_compiling():
        return dequantize(q, scale, dtype)
    return _dequantize_opaque(q, scale, dtype, after)


def encode(vectors: Tensor, fmt: str) -> tuple[Tensor, Tensor | None]:
    """See ``basis.encode``; int4 in groups of 128, 64 or 32 has a kernel."""
    group = int8.group_size_for(vectors.shape[1])
    module = None
    if fmt == "int4":
        module = kernels_for(vectors.device, _group_obstacle("basis", group))
    return basis.encode(vectors, fmt) if module is None else module.encode_int4(vectors.float().contiguous(), group)


def decode(codes: Tensor, scale: Tensor | None, dim: int, fmt: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """See ``basis.decode``; int4 has a kernel."""
    module = kernels_for(codes.device) if fmt == "int4" else None
    if module is None:
        return basis.decode(codes, scale, dim, fmt, dtype)
    return module.decode_int4(codes, scale, dim, dtype)


def _group_obstacle(name: str, group: int) -> str | None:
    return None if group in int8.GROUP_SIZES else f"a {name} in groups of a whole row ({group} values) has no kernel"


def _way_obstacle(rounding: str, scales: str) -> str | None:
    if (rounding, scales) == ("stochastic", "sticky"):
        return None
    return f"a merge with {rounding} rounding and {scales} scales has no kernel"


def fused_merge(
    q: Tensor,
    scale: Tensor,
    delta: Tensor,
    left: tuple[Tensor, Tensor | None, str] | None,
    right: tuple[Tensor, Tensor | None, str] | None,
    *,
    s: float,
    shrink: float,
    key: tuple[int, int],
    first_row: int = 0,
    rounding: str = "stochastic",
    scales: str = "sticky",
) -> bool:
    """``W ← SR(W · (1 − shrink) + s · L Δ R̂ᵀ)`` in place by a kernel; False, with nothing done, if there is none.

    ``left`` and ``right`` are a stored basis's (codes, scale, format) or None; the rest as in ``kernels.merge``.
    Without a kernel the caller merges through ``int8.write_back``, which knows other ``rounding`` and ``scales`` too.
    """
    obstacle = _group_obstacle("weight", q.shape[1] // scale.shape[1])
    if (left is None) == (right is None):
        obstacle = "a merge with no basis, or with one on either side, has no kernel"
    codes, basis_scale, fmt = left or right or (None, None, "")
    if obstacle is None and fmt != "int4":
        obstacle = f"a merge with a basis in {fmt} has no kernel"
    obstacle = _way_obstacle(rounding, scales) or obstacle
    module = kernels_for(q.device, obstacle)
    if module is None:
        return False
    side, dim = ("right", q.shape[1]) if left is None else ("left", q.shape[0])
    delta, where = delta.float().contiguous(), {"key": key, "first_row": first_row}
    module.merge(q, scale, delta, codes, basis_scale, dim, side, s=s, shrink=shrink, **where)
    return True


class StoredBasis(Protocol):
    """Columns (dim, rank) as ``basis.encode`` stores them."""

    codes: Tensor
    scale: Tensor | None
    fmt: str

    def columns(self) -> Tensor:
        """fp32 (dim, rank)."""
        ...


@torch.no_grad()
def merge(
    weight: Tensor,
    scale: Tensor | None,
    delta: Tensor,
    left: StoredBasis | None,
    right: StoredBasis | None,
    *,
    s: float,
    shrink: float,
    key: tuple[int, int],
    first_row: int = 0,
    rounding: str = "stochastic",
    scales: str = "sticky",
) -> None:
    """``W ← W · (1 − shrink) + s · L Δ R̂ᵀ`` in place, rounded once: by a kernel where there is one.

    ``weight`` (rows, in): int8 with its ``scale``, or floating point without; ``delta``: fp32. ``left`` and ``right``
    are None for the identity. The rest as in ``int8.write_back``; ``rounding`` and ``scales`` are those of int8.
    """
    if scale is not None and kernels_for(weight.device) is not None:
        stored = [None if side is None else (side.codes, side.scale, side.fmt) for side in (left, right)]
        how = {"rounding": rounding, "scales": scales}
        if fused_merge(weight, scale, delta, *stored, s=s, shrink=shrink, key=key, first_row=first_row, **how):
            return
    columns = None if left is None else left.columns(), None if right is None else right.columns()
    rows = basis.update_rows(delta, *columns, s)
    if scale is None:
        dense.write_back(weight, rows, shrink=shrink, key=key, first_row=first_row)
        return
    int8.write_back(weight, scale, rows, shrink=shrink, key=key, first_row=first_row, rounding=rounding, scales=scales)
