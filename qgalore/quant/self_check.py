"""Whether kernels compute what the formats define, tried on small odd tensors on the device that is to use them.

A kernel that is right in Triton's interpreter may still be wrong on a GPU that nobody has tried. Each is compared, bit
for bit, with the reference on the CPU; the merge in sums of few bits, which every order of adding gives exactly.
"""

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from . import basis, int8

_KEY = (0x1234567, -0x7654321)
Values = list[Tensor]


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


def _integers(*shape: int, top: int) -> Tensor:
    return torch.randint(-top, top + 1, shape, generator=torch.Generator().manual_seed(top)).float()


def _dequantize(module: ModuleType, device: torch.device) -> tuple[Values, Values]:
    got, wanted = [], []
    for rows, width, group in ((5, 96, 32), (3, 128, 128), (2, 33, 33)):
        q, scale = int8.quantize(_normal(rows, width), group)
        for dtype in (torch.float32, torch.bfloat16):
            got.append(module.dequantize(q.to(device), scale.to(device), dtype))
            wanted.append(int8.dequantize(q, scale, dtype))
    return got, wanted


def _encode(module: ModuleType, device: torch.device) -> tuple[Values, Values]:
    got, wanted = [], []
    for dim in (96, 192, 128):
        vectors = _normal(5, dim)
        vectors[1] = 0.0
        vectors[2] = _integers(dim, top=6) + 0.5
        # A scale of exactly 1, so that the other values are ties.
        vectors[2, ::32] = 7.0
        got += module.encode_int4(vectors.to(device), int8.group_size_for(dim))
        wanted += basis.encode(vectors, "int4")
    return got, wanted


def _decode(module: ModuleType, device: torch.device) -> tuple[Values, Values]:
    got, wanted = [], []
    for dim in (33, 192):
        codes, scale = basis.encode(_normal(3, dim), "int4")
        assert scale is not None, "int4 has scales"
        for dtype in (torch.float32, torch.bfloat16):
            got.append(module.decode_int4(codes.to(device), scale.to(device), dim, dtype))
            wanted.append(basis.decode(codes, scale, dim, "int4", dtype))
    return got, wanted


def _merge(module: ModuleType, device: torch.device) -> tuple[Values, Values]:
    """Both sides, a rank that ends in the middle of a tile, rows of a larger tensor, scales that move and that stay."""
    got, wanted = [], []
    rows, width, rank, first = 37, 192, 35, 11
    for on_left, shrink, s in ((False, 0.0, 0.25), (True, 0.01, 0.25), (False, 0.01, 64.0)):
        dim, inner = (rows, width) if on_left else (width, rows)
        vectors = _integers(rank, dim, top=7)
        vectors[:, 0] = 7.0
        codes, scale = basis.encode(vectors, "int4")
        assert scale is not None, "int4 has scales"
        delta = _integers(rank, inner, top=5) * 2.0**-10
        delta = (delta if on_left else delta.T).contiguous()
        stored = int8.quantize(_normal(rows, width), 64)
        there = [part.to(device, copy=True) for part in stored]
        options = {"shrink": shrink, "key": _KEY, "first_row": first}
        basis_there = (codes.to(device), scale.to(device), dim, "left" if on_left else "right")
        module.merge(*there, delta.to(device), *basis_there, s=s, **options)
        decoded = basis.decode(codes, scale, dim, "int4")
        update = (decoded.T @ delta if on_left else delta @ decoded).mul_(s)
        int8.write_back(*stored, lambda a, b, update=update: update[a:b], **options)
        got += there
        wanted += stored
    return got, wanted


CHECKS: dict[str, Callable[[ModuleType, torch.device], tuple[Values, Values]]] = {
    "dequantize": _dequantize,
    "encode_int4": _encode,
    "decode_int4": _decode,
    "merge": _merge,
}


@torch.no_grad()
def first_failure(module: ModuleType, device: torch.device) -> str | None:
    """What is wrong with the first kernel of ``module`` that fails on ``device``, or None if all are right."""
    for name, check in CHECKS.items():
        try:
            pairs = list(zip(*check(module, device), strict=True))
            wrong = [pair for pair in pairs if not torch.equal(pair[0].cpu(), pair[1])]
        except Exception as error:  # whatever a compiler or driver raises
            reason = (str(error).splitlines() or [""])[0][:200]
            return f"the kernel {name} fails on {device} with {type(error).__name__}: {reason}"
        if wrong:
            return f"the kernel {name} differs from the reference on {device} in {len(wrong)} of {len(pairs)} cases"
    return None
