"""Which code works on a format: the plain PyTorch reference, or the Triton kernels where they apply.

The choice is one for the process, made by :func:`use`: ``reference``; ``auto``, kernels for tensors on a GPU if Triton
is installed and every kernel passes ``self_check`` there, else the reference and a printed line; or ``triton``, which
raises where a kernel cannot run. Code that ``torch.compile`` traces always takes the reference, which it fuses itself.
"""

import os
import sys
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import ConfigError
from . import basis, dense, int8
from .self_check import first_failure

CHOICES = ("auto", "reference", "triton")
KERNEL_ELEMENTS = 2 * int8.TILE_ELEMENTS  # of rows that are computed for one launch: no more than a plan counts
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
        package = "triton-windows" if sys.platform == "win32" else "triton"
        return f"Triton is not installed (pip install {package})"
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
        whole = f"a basis in groups of a whole row ({group} values) has no kernel that packs it"
        module = kernels_for(vectors.device, None if group in int8.GROUP_SIZES else whole)
    return basis.encode(vectors, fmt) if module is None else module.encode_int4(vectors.float().contiguous(), group)


def decode(codes: Tensor, scale: Tensor | None, dim: int, fmt: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """See ``basis.decode``; int4 has a kernel."""
    module = kernels_for(codes.device) if fmt == "int4" else None
    if module is None:
        return basis.decode(codes, scale, dim, fmt, dtype)
    return module.decode_int4(codes, scale, dim, dtype)


class StoredBasis(Protocol):
    """Columns (dim, rank) as ``basis.encode`` stores them."""

    codes: Tensor
    scale: Tensor | None
    fmt: str
    dim: int

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
    """``W ← W · (1 − shrink) + s · L Δ R̂ᵀ`` in place, rounded once: by kernels where there are some.

    ``weight`` (rows, in): int8 with its ``scale``, or floating point without; ``delta``: fp32. ``left`` and ``right``
    are None for the identity. The rest as in ``int8.write_back``; ``rounding`` and ``scales`` are those of int8.
    A kernel multiplies with one basis in int4. Other products are PyTorch's, and only the writing is a kernel's.
    """
    how: dict[str, Any] = {"shrink": shrink, "key": key, "first_row": first_row}
    if left is not None and right is not None:
        delta, left = left.columns() @ delta, None
    stored = right if left is None else left
    if stored is None:
        write_back(weight, scale, delta.view(weight.shape), s=s, **how, rounding=rounding, scales=scales)
        return
    module = _writer(weight, scale, rounding, scales)
    if module is not None and scale is not None and stored.fmt == "int4":
        place = (stored.codes, stored.scale, stored.dim, "right" if left is None else "left")
        module.merge(weight, scale, delta.float().contiguous(), *place, s=s, **how)
        return
    columns = None if left is None else left.columns(), None if right is None else right.columns()
    rows = basis.update_rows(delta, *columns, s)
    if module is None:
        _by_reference(weight, scale, rows, rounding, scales, **how)
    else:
        _by_kernels(module, weight, scale, rows, s=1.0, **how)


def _by_reference(
    weight: Tensor, scale: Tensor | None, rows: Callable[[int, int], Tensor], rounding: str, scales: str, **how: Any
) -> None:
    if scale is None:
        dense.write_back(weight, rows, **how)
    else:
        int8.write_back(weight, scale, rows, **how, rounding=rounding, scales=scales)


def _writer(weight: Tensor, scale: Tensor | None, rounding: str, scales: str) -> ModuleType | None:
    """The kernels that write back into ``weight``, or None."""
    obstacle = None
    if scale is not None and (rounding, scales) != ("stochastic", "sticky"):
        obstacle = f"a write-back with {rounding} rounding and {scales} scales has no kernel"
    elif not weight.is_contiguous() or (scale is not None and not scale.is_contiguous()):
        obstacle = "a weight that is not contiguous has no kernel"
    return kernels_for(weight.device, obstacle)


@torch.no_grad()
def write_back(
    weight: Tensor,
    scale: Tensor | None,
    update: Tensor | Callable[[int, int], Tensor],
    *,
    s: float = 1.0,
    shrink: float,
    key: tuple[int, int],
    first_row: int = 0,
    rounding: str = "stochastic",
    scales: str = "sticky",
) -> None:
    """``W ← W · (1 − shrink) + s · update`` in place, rounded once: by a kernel where there is one.

    ``update``: of the weight's shape, or a function that gives its rows a … b−1, fp32, which may be overwritten. One
    kernel writes a tensor; rows that are yet to be computed are written as they come. The rest as in :func:`merge`.
    """
    how: dict[str, Any] = {"shrink": shrink, "key": key, "first_row": first_row}
    module = _writer(weight, scale, rounding, scales)
    if module is None:
        _by_reference(weight, scale, _scaled_rows(update, s), rounding, scales, **how)
    else:
        _by_kernels(module, weight, scale, update, s=s, **how)


def _by_kernels(
    module: ModuleType,
    weight: Tensor,
    scale: Tensor | None,
    update: Tensor | Callable[[int, int], Tensor],
    *,
    first_row: int,
    **how: Any,
) -> None:
    whole = isinstance(update, Tensor)
    for a, b in [(0, len(weight))] if whole else int8.row_tiles(len(weight), weight.shape[1], KERNEL_ELEMENTS):
        values = (update if whole else update(a, b)).contiguous()
        if scale is None:
            module.write_back_dense(weight[a:b], values, **how, first_row=first_row + a)
        else:
            module.write_back(weight[a:b], scale[a:b], values, **how, first_row=first_row + a)


def _scaled_rows(update: Tensor | Callable[[int, int], Tensor], s: float) -> Callable[[int, int], Tensor]:
    """``update`` times ``s`` by rows, in fp32."""
    if isinstance(update, Tensor):
        whole = update
        return lambda a, b: whole[a:b].float() if s == 1.0 else whole[a:b].float() * s
    return update if s == 1.0 else lambda a, b: update(a, b).mul_(s)
