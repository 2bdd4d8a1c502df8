"""Q-GaLore on one page: one step of one weight, in plain PyTorch, with every tensor whole and nothing in parts.

The package does the same in less memory: it never forms the whole gradient, the update or an fp32 weight. This page is
what to read first, and what the tests hold the package to. Nothing else imports it. One step of a weight W (out, in)
with the gradient G, where out ≥ in; otherwise all is transposed, and the basis is on the left:

    search    P ← int4(the r leading right singular vectors of G)    in some steps only   GaLore (arXiv 2403.03507) §3;
                                                                     Q-GaLore (arXiv 2407.08296) §3.3 for the int4
    turn      C = P_newᵀ P_old;  M ← M Cᵀ;  V ← V (C∘C)ᵀ            after a search       ours, docs/method.md
    project   R = G P                                                GaLore, algorithm 2
    adapt     M ← β₁M + (1 − β₁)R;  V ← β₂V + (1 − β₂)R∘R            Adam (arXiv 1412.6980), algorithm 1
              N = M̂ / (√V̂ + ε), then M and V to 8 bits              8-bit optimizers (arXiv 2110.02861) §2
    write     W ← SR((1 − lr·λ) W − lr·s·N Pᵀ)                       GaLore, algorithm 2 with AdamW's decay λ;
                                                                     Q-GaLore §3.4 for SR, stochastic rounding
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 256  # moments that share an absmax
GROUP = 32  # weights that share a scale; 128 in the package where it divides the width
SMALL = 4096  # moments of smaller tensors stay in fp32, as in bitsandbytes


@dataclass
class Weight:
    """One weight and all that belongs to it. Tensors are floating point, their values those of the stored formats."""

    values: Tensor  # (out, in) fp64: integers from −127 to 127 times their group's scale
    scale: Tensor  # (out, in / GROUP) fp64
    basis: Tensor | None = None  # (in, r), or (out, r) of a wide weight
    first: Tensor | None = None  # M, (out, r) or (r, in)
    second: Tensor | None = None  # V
    steps: int = 0


def step(
    weight: Weight,
    gradient: Tensor,
    uniform: Tensor,
    *,
    search: bool,
    rank: int,
    lr: float,
    scale: float = 0.25,
    decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> None:
    """One step of Q-GaLore in place. ``gradient`` (out, in) fp32; ``uniform`` (out, in): numbers in (0, 1) for the
    stochastic rounding; ``search``: whether this step looks for a new basis, as a layer's first step must."""
    wide = gradient.shape[0] < gradient.shape[1]
    g = gradient.T if wide else gradient  # (long side, short side)

    if search:
        old, weight.basis = weight.basis, int4(torch.linalg.svd(g, full_matrices=False).Vh[:rank].T)
        if old is not None and weight.first is not None and weight.second is not None:
            turn = weight.basis.T @ old
            weight.first = eight_bits(turned(weight.first, turn, wide), signed=True)
            weight.second = eight_bits(turned(weight.second, turn.square(), wide), signed=False)

    assert weight.basis is not None, "the first step of a weight must search"
    r = g @ weight.basis
    # Moments have the shape in which the package keeps them: their blocks of 256 run along rows.
    r = r.T if wide else r
    weight.steps += 1
    m = betas[0] * (0.0 if weight.first is None else weight.first) + (1 - betas[0]) * r
    v = betas[1] * (0.0 if weight.second is None else weight.second) + (1 - betas[1]) * r.square()
    m_hat, v_hat = m / (1 - betas[0] ** weight.steps), v / (1 - betas[1] ** weight.steps)
    n = m_hat / (v_hat.sqrt() + eps)
    weight.first, weight.second = eight_bits(m, signed=True), eight_bits(v, signed=False)

    update = weight.basis @ n if wide else n @ weight.basis.T
    exact = (1 - lr * decay) * weight.values - lr * scale * update.double()
    weight.values, weight.scale = int8(exact, weight.scale, uniform)


def turned(moment: Tensor, change: Tensor, wide: bool) -> Tensor:
    """A moment in the coordinates of a new basis."""
    return change @ moment if wide else moment @ change.T


def int4(columns: Tensor) -> Tensor:
    """``columns`` (dim, r) as they are read back from int4: each in groups with a bf16 scale of absmax / 7."""
    size = next((size for size in (128, 64, 32) if len(columns) % size == 0), len(columns))
    groups = columns.T.reshape(-1, size)
    unit = (groups.abs().amax(dim=1, keepdim=True) / 7).bfloat16().float()
    return ((groups / unit).round().clamp(-7, 7) * unit).view(columns.shape[1], -1).T


def dynamic_code(signed: bool) -> Tensor:
    """The 256 values of the dynamic data type: 0, 1, and the middles of ever more equal intervals in seven decades."""
    values = [torch.tensor([0.0, 1.0])]
    for decade in range(7):
        edges = torch.linspace(0.1, 1.0, 2**decade * (1 if signed else 2) + 1)
        middles = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - 6)
        values += [middles, -middles] if signed else [middles]
    return torch.cat(values).sort().values


def eight_bits(moment: Tensor, *, signed: bool) -> Tensor:
    """A moment as it is read back from 8 bits: blocks of 256, each value the nearest of the code times the absmax. A
    second moment that is not zero does not become zero, since it is divided by."""
    if moment.numel() < SMALL:
        return moment
    code = dynamic_code(signed)
    blocks = torch.nn.functional.pad(moment.reshape(-1), (0, -moment.numel() % BLOCK)).view(-1, BLOCK)
    peak = blocks.abs().amax(dim=1, keepdim=True)
    share = blocks / peak.clamp_min(torch.finfo(torch.float32).tiny)
    nearest = (share.unsqueeze(2) - code).abs().argmin(dim=2)
    if not signed:
        nearest = nearest.clamp(min=1).where(share > 0, nearest)
    return (code[nearest] * peak).view(-1)[: moment.numel()].view(moment.shape)


def int8(exact: Tensor, scale: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """``exact`` (out, in) fp64 rounded stochastically to the int8 grid, and the grid's scales.

    A scale stays until its group outgrows ±127 or falls below 63; the new one leaves 10 % of room.
    """
    groups = exact.view(len(exact), -1, GROUP)
    peak = groups.abs().amax(dim=2) / scale
    fresh = (peak * scale * 1.1 / 127).float().clamp(2.0**-17, 65280.0).bfloat16().double()
    scale = torch.where((peak > 127) | (peak < 63), fresh, scale)
    units = groups / scale.unsqueeze(2)
    whole = units.floor()
    integers = whole + (uniform.view(units.shape) < units - whole)
    return (integers.clamp(-127, 127) * scale.unsqueeze(2)).view(exact.shape), scale
