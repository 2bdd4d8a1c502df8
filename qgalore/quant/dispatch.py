"""Which code works on a format: the plain PyTorch reference, or the Triton kernels where they apply.

``kernels`` is ``reference``, ``triton`` (raises where a kernel cannot run) or ``auto``: kernels for tensors on a GPU if
Triton is installed, the reference otherwise. What ``auto`` cannot give to a kernel on a GPU is printed once.
"""

import os
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from ..errors import ConfigError
from . import basis, int8

CHOICES = ("auto", "reference", "triton")


@cache
def _say_once(text: str) -> None:
    print(f"kernels    {text}", flush=True)


def kernels_for(device: torch.device, kernels: str, obstacle: str | None = None) -> ModuleType | None:
    """The module of kernels to use for tensors on ``device``, or None for the reference.

    ``obstacle`` says why this case has no kernel. Raises :class:`ConfigError` for an unknown ``kernels``, and under
    ``triton`` for whatever keeps a kernel from running.
    """
    if kernels not in CHOICES:
        raise ConfigError(f"kernels is {kernels!r}; it must be one of {CHOICES}")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if kernels == "reference" or (kernels == "auto" and device.type != "cuda"):
        return None
    if find_spec("triton") is None:
        obstacle = "Triton is not installed (pip install triton)"
    elif device.type != "cuda" and not interpreted:
        obstacle = f"Triton does not run on {device.type}"
    if obstacle is None:
        from . import kernels as module

        return module
    if kernels == "triton":
        raise ConfigError(f"kernels is 'triton', but {obstacle}; set kernels to auto or reference")
    _say_once(f"{obstacle}: plain PyTorch is used there")
    return None


def dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32, kernels: str = "auto") -> Tensor:
    """See ``int8.dequantize``."""
    module = kernels_for(q.device, kernels)
    return int8.dequantize(q, scale, dtype) if module is None else module.dequantize(q, scale, dtype)


def encode(vectors: Tensor, fmt: str, kernels: str = "auto") -> tuple[Tensor, Tensor | None]:
    """See ``basis.encode``; int4 in groups of 128, 64 or 32 has a kernel."""
    group = int8.group_size_for(vectors.shape[1])
    module = None
    if fmt == "int4":
        module = kernels_for(vectors.device, kernels, _group_obstacle("basis", group))
    return basis.encode(vectors, fmt) if module is None else module.encode_int4(vectors.float().contiguous(), group)


def decode(
    codes: Tensor, scale: Tensor | None, dim: int, fmt: str, dtype: torch.dtype = torch.float32, kernels: str = "auto"
) -> Tensor:
    """See ``basis.decode``; int4 has a kernel."""
    module = kernels_for(codes.device, kernels) if fmt == "int4" else None
    if module is None:
        return basis.decode(codes, scale, dim, fmt, dtype)
    return module.decode_int4(codes, scale, dim, dtype)


def _group_obstacle(name: str, group: int) -> str | None:
    return None if group in int8.GROUP_SIZES else f"a {name} in groups of a whole row ({group} values) has no kernel"


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
    kernels: str = "auto",
) -> bool:
    """``W ← SR(W · (1 − shrink) + s · L Δ R̂ᵀ)`` in place by a kernel; False, with nothing done, if there is none.

    ``left`` and ``right`` are a stored basis's (codes, scale, format) or None; the rest as in ``kernels.merge``.
    Without a kernel the caller merges through ``int8.write_back``.
    """
    obstacle = _group_obstacle("weight", q.shape[1] // scale.shape[1])
    if (left is None) == (right is None):
        obstacle = "a merge with no basis, or with one on either side, has no kernel"
    codes, basis_scale, fmt = left or right or (None, None, "")
    if obstacle is None and fmt != "int4":
        obstacle = f"a merge with a basis in {fmt} has no kernel"
    module = kernels_for(q.device, kernels, obstacle)
    if module is None:
        return False
    side, dim = ("right", q.shape[1]) if left is None else ("left", q.shape[0])
    delta = delta.float().contiguous()
    module.merge(q, scale, delta, codes, basis_scale, dim, side, s=s, shrink=shrink, key=key)
    return True
