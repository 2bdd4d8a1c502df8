"""The table of codes in muon.md: python docs/lab/momentum_codes.py CHECKPOINT/optimizer.safetensors

The checkpoint is one of a run with ``lowrank.rule=muon lowrank.momentum=fp32``. For some of its momenta it prints the
cosine between the orthogonalised momentum and the one that is orthogonalised after it was stored in a code.
"""

import sys
from functools import partial

import torch
from safetensors.torch import load_file
from torch import Tensor

from qgalore.lowrank.rules.orthogonal import orthogonalize
from qgalore.quant.counter import derive_key, random_bits, uniform
from qgalore.quant.int8 import group_size_for
from qgalore.quant.momentum import StoredMomentum

LAYERS, PARTS, DRAWS = (0, 2, 3), ("self_attn.q_proj", "mlp.down_proj", "mlp.gate_proj"), 3


def plain(matrix: Tensor, key: tuple[int, int], how: str) -> Tensor:
    """Read back from 4 bits with one scale a group, rounded as ``how`` says: to the nearest, stochastic, dither."""
    value = matrix.view(len(matrix), -1, group_size_for(matrix.shape[1]))
    scale = value.abs().amax(dim=2, keepdim=True).clamp_min(1e-30)
    u = (uniform(random_bits(key, 0, matrix.numel())) - 1).view(value.shape)
    if how == "dither":
        read = scale * ((7.5 * value / scale + u).round().clamp(-8, 7) - u) / 7.5
    elif how == "stochastic":
        read = scale * (7 * value / scale + u).ceil().clamp(-7, 7) / 7
    else:
        read = scale * (7 * value / scale).round() / 7
    return read.view(matrix.shape)


def scaled(matrix: Tensor, key: tuple[int, int], how: str) -> Tensor:
    """The same after the sizes of rows and columns are taken out."""
    rows = matrix.square().mean(dim=1, keepdim=True).sqrt().clamp_min(1e-30)
    columns = (matrix / rows).square().mean(dim=0).sqrt().clamp_min(1e-30)
    return plain(matrix / rows / columns, key, how) * columns * rows


def stored(matrix: Tensor, key: tuple[int, int], fmt: str) -> Tensor:
    """Read back as rule ``muon`` stores it."""
    kept = StoredMomentum(*matrix.shape, fmt)
    kept.write(matrix, key)
    return kept.read(key)


HOW = ("stochastic", "nearest", "dither")
CODES = {how: partial(plain, how=how) for how in HOW}
CODES |= {f"scales, {how}": partial(scaled, how=how) for how in HOW[:2]}
CODES |= {fmt: partial(stored, fmt=fmt) for fmt in ("4bit", "8bit", "bf16")}


def main() -> None:
    state = load_file(sys.argv[1])
    for layer in LAYERS:
        for part in PARTS:
            momentum = state[f"model.layers.{layer}.{part}|extra|rule.values"]
            exact = orthogonalize(momentum).flatten()
            print(layer, part, tuple(momentum.shape))
            for name, code in CODES.items():
                reads = [code(momentum, derive_key(0, draw, layer)) for draw in range(DRAWS)]
                cosines = [torch.cosine_similarity(orthogonalize(read).flatten(), exact, dim=0) for read in reads]
                print(f"    {name:<20}{float(torch.stack(cosines).mean()):.3f}")


if __name__ == "__main__":
    main()
