"""Every kernel against the reference, in the forms that a run launches."""

import os
from importlib.util import find_spec

import torch

from ..quant import basis, int8, self_check

RANK = 1024
SIDES = (("right", 128), ("left", 128), ("right", "row"), ("left", "row"))


def _large_merge(module, device: torch.device, side: str, grid: int | str, width: int) -> bool:
    """Whether the merge of a layer of 7B's width and rank is the reference's, bit for bit. Its numbers have few bits,
    so that every order of adding gives the same sums."""
    rows, rank = 256, min(RANK, width // 4)
    generator = torch.Generator().manual_seed(1)
    q, scale = int8.quantize(torch.randn(rows, width, generator=generator) * 0.02, int8.group_size_for(width, grid))
    dim, inner = (rows, width) if side == "left" else (width, rows)
    vectors = torch.randint(-7, 8, (rank, dim), generator=generator).float()
    vectors[:, :: int8.group_size_for(dim)] = 7.0
    codes, unit = basis.encode(vectors, "int4")
    assert unit is not None, "int4 has scales"
    delta = torch.randint(-5, 6, (rank, inner), generator=generator) * 2.0**-14
    delta = (delta if side == "left" else delta.T).contiguous()
    there = [value.to(device, copy=True) for value in (q, scale)]
    options = {"shrink": 0.001, "key": (5, -7), "first_row": 3}
    module.merge(*there, delta.to(device), codes.to(device), unit.to(device), dim, side, s=0.25, **options)
    update = (vectors.T @ delta if side == "left" else delta @ vectors).mul_(0.25)
    int8.write_back(q, scale, lambda a, b: update[a:b], **options)
    return torch.equal(there[0].cpu(), q) and torch.equal(there[1].cpu(), scale)


def examine(device: torch.device) -> tuple[list[str], bool]:
    """(a line for each kernel, whether none is wrong). Where no kernel can run, a line says so, and none is wrong."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if find_spec("triton") is None or (device.type != "cuda" and not interpreted):
        why = "Triton is not installed" if find_spec("triton") is None else "Triton does not run on a CPU"
        return [f"no kernel can run here: {why}; plain PyTorch is used"], True
    from ..quant import kernels

    found, right = [], True
    for name in self_check.CHECKS:
        problem = self_check.failure_of(kernels, device, name)
        right &= problem is None
        found.append(f"{name:<28}{'right' if problem is None else f'WRONG: {problem}'}")
    width = 4096 if device.type == "cuda" else 256
    for side, grid in SIDES:
        same = _large_merge(kernels, device, side, grid, width)
        right &= same
        found.append(f"{f'merge {side}, {width} wide, {grid}':<28}{'right' if same else 'WRONG: differs'}")
    return found, right
