"""Whether kernels compute what the formats define, tried on small odd tensors on the device that is to use them.

A kernel that is right in Triton's interpreter may still be wrong on a GPU that nobody has tried. Each is compared, bit
for bit, with the reference on the CPU. The merge is compared in numbers of few bits, which add up exactly in any order.
The sizes are such that the forms that a run launches are among those that are tried.
"""

from collections.abc import Callable, Iterator
from types import ModuleType

import torch
from torch import Tensor

from . import basis, dense, int8

_KEY = (0x1234567, -0x7654321)
Pairs = Iterator[tuple[Tensor, Tensor]]  # (what the kernel gives, what it should)


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


def _integers(*shape: int, top: int) -> Tensor:
    return torch.randint(-top, top + 1, shape, generator=torch.Generator().manual_seed(top)).float()


def _dequantize(module: ModuleType, device: torch.device) -> Pairs:
    for rows, width, group in ((5, 96, 32), (16, 256, 128), (3, 4096, 4096), (2, 33, 33)):
        q, scale = int8.quantize(_normal(rows, width), group)
        for dtype in (torch.float32, torch.bfloat16):
            yield module.dequantize(q.to(device), scale.to(device), dtype), int8.dequantize(q, scale, dtype)


def _encode(module: ModuleType, device: torch.device) -> Pairs:
    for dim in (96, 192, 1024):
        vectors = _normal(5, dim)
        vectors[1] = 0.0
        vectors[2] = _integers(dim, top=6) + 0.5
        # A scale of exactly 1, so that the other values are ties.
        vectors[2, ::32] = 7.0
        codes, scale = basis.encode(vectors, "int4")
        assert scale is not None, "int4 has scales"
        yield from zip(module.encode_int4(vectors.to(device), int8.group_size_for(dim)), (codes, scale), strict=True)


def _decode(module: ModuleType, device: torch.device) -> Pairs:
    for dim in (33, 192, 4096):
        codes, scale = basis.encode(_normal(3, dim), "int4")
        assert scale is not None, "int4 has scales"
        for dtype in (torch.float32, torch.bfloat16):
            made = module.decode_int4(codes.to(device), scale.to(device), dim, dtype)
            yield made, basis.decode(codes, scale, dim, "int4", dtype)


def _merge(module: ModuleType, device: torch.device) -> Pairs:
    """Both sides and both kinds of groups, in sizes that a GPU reads in large words and in odd ones; a rank that ends
    in the middle of a tile, rows of a larger tensor, scales that move and that stay."""
    for rows, width, group, rank in ((64, 256, 128, 48), (64, 256, 256, 48), (37, 192, 64, 35), (37, 33, 33, 5)):
        for side, shrink, s in (("right", 0.0, 0.25), ("left", 0.01, 64.0)):
            dim, inner = (rows, width) if side == "left" else (width, rows)
            vectors = _integers(rank, dim, top=7)
            vectors[:, :: int8.group_size_for(dim)] = 7.0  # scales of exactly 1: no product is rounded, not to bf16
            codes, scale = basis.encode(vectors, "int4")
            assert scale is not None, "int4 has scales"
            delta = _integers(rank, inner, top=5) * 2.0**-10
            delta = (delta if side == "left" else delta.T).contiguous()
            stored = int8.quantize(_normal(rows, width), group)
            there = [part.to(device, copy=True) for part in stored]
            options = {"shrink": shrink, "key": _KEY, "first_row": 11}
            module.merge(*there, delta.to(device), codes.to(device), scale.to(device), dim, side, s=s, **options)
            decoded = basis.decode(codes, scale, dim, "int4")
            update = (decoded.T @ delta if side == "left" else delta @ decoded).mul_(s)
            int8.write_back(*stored, lambda a, b, update=update: update[a:b], **options)
            yield from zip(there, stored, strict=True)


def _write_back(module: ModuleType, device: torch.device) -> Pairs:
    for rows, width, group in ((48, 256, 128), (5, 4096, 4096), (37, 96, 32), (5, 33, 33)):
        for dtype, shrink, s in ((torch.float32, 0.0, 1.0), (torch.bfloat16, 0.01, -0.3), (torch.float32, 0.0, 64.0)):
            update = (_normal(rows, width + 1)[:, 1:] * 0.02).to(dtype)
            stored = int8.quantize(_normal(rows, width), group)
            there = [part.to(device, copy=True) for part in stored]
            options = {"shrink": shrink, "key": _KEY, "first_row": 11}
            module.write_back(*there, update.contiguous().to(device), s=s, **options)
            int8.write_back(*stored, lambda a, b, u=update, s=s: u[a:b].float() * s, **options)
            yield from zip(there, stored, strict=True)


def _write_back_dense(module: ModuleType, device: torch.device) -> Pairs:
    for shape in ((48, 256), (37, 33)):
        for dtype, shrink, s in ((torch.bfloat16, 0.01, -0.3), (torch.float32, 0.0, 1.0)):
            weight, update = _normal(*shape).to(dtype), _normal(*reversed(shape)).T.contiguous() * 1e-3
            options = {"shrink": shrink, "key": _KEY, "first_row": 11}
            there = weight.to(device, copy=True)
            module.write_back_dense(there, update.to(device), s=s, **options)
            dense.write_back(weight, lambda a, b, u=update, s=s: u[a:b] * s, **options)
            yield there, weight


def _round_tokens(module: ModuleType, device: torch.device) -> Pairs:
    for tokens, length in ((5, 40), (3, 4096)):
        for dtype in (torch.float32, torch.bfloat16):
            values = (_normal(tokens, length) * 10.0 ** torch.arange(-2, tokens - 2).unsqueeze(1)).to(dtype)
            scale = _normal(length).to(torch.bfloat16)
            for factor in (None, scale):
                made = module.round_tokens(values.to(device), None if factor is None else factor.to(device))
                yield from zip(made, _reference_tokens(values, factor), strict=True)


def _reference_tokens(values: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    values = values.float() if scale is None else values.float() * scale.float()
    step = values.abs().amax(dim=1, keepdim=True) / values.new_full((), int8.QMAX)
    return (values / step).round().to(torch.int8), step


def _int8_product(module: ModuleType, device: torch.device) -> Pairs:
    """Both layouts, with and without scales and bias, in sizes that fill tiles and that do not. Nothing is compared on
    a device on which nothing would be launched."""
    if not module.multiplies_integers(device):
        return
    for tokens, length, width in ((5, 24, 40), (130, 256, 144)):
        a, b = (_integers(*shape, top=int8.QMAX).to(torch.int8) for shape in ((tokens, length), (length, width)))
        step, scale, bias = _normal(tokens, 1).abs(), _normal(width).abs().bfloat16(), _normal(width).bfloat16()
        sums = (a.int() @ b.int()).float() * step
        there = [value.to(device) for value in (a, step)]
        for transposed in (False, True):
            right = (b.T.contiguous() if transposed else b).to(device)
            for dtype in (torch.float32, torch.bfloat16):
                more = {"scale": scale.to(device), "bias": bias.to(device)} if transposed else {}
                made = module.int8_product(*there, right, dtype, transposed=transposed, **more)
                yield made, (sums * scale.float() + bias.float() if transposed else sums).to(dtype)


CHECKS: dict[str, Callable[[ModuleType, torch.device], Pairs]] = {
    "dequantize": _dequantize,
    "encode_int4": _encode,
    "decode_int4": _decode,
    "merge": _merge,
    "write_back": _write_back,
    "write_back_dense": _write_back_dense,
    "round_tokens": _round_tokens,
    "int8_product": _int8_product,
}


def first_failure(module: ModuleType, device: torch.device) -> str | None:
    """What is wrong with the first kernel of ``module`` that fails on ``device``, or None if all are right."""
    return next((problem for name in CHECKS if (problem := failure_of(module, device, name)) is not None), None)


@torch.no_grad()
def failure_of(module: ModuleType, device: torch.device, name: str) -> str | None:
    """What is wrong with the kernel ``name`` of ``module`` on ``device``, or None."""
    try:
        with torch.device("cpu"):  # whatever a program has made the default
            pairs = list(CHECKS[name](module, device))
        wrong = [pair for pair in pairs if not torch.equal(pair[0].cpu(), pair[1])]
    except Exception as error:  # whatever a compiler or driver raises
        reason = (str(error).splitlines() or [""])[0][:200]
        return f"the kernel {name} fails on {device} with {type(error).__name__}: {reason}"
    if wrong:
        return f"the kernel {name} differs from the reference on {device} in {len(wrong)} of {len(pairs)} cases"
    return None
