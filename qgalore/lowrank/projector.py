"""Finding a projection basis, and comparing two of them: in fp32, on one gradient of any float dtype at a time.

A basis for the right side of G (out, in) spans the dominant right singular vectors; the left side is the right side of
Gᵀ, so every function here speaks of the right.
"""

import torch
from torch import Tensor

from .sides import fp32_tiles, project

METHODS = ("randomized", "exact")
OVERSAMPLE = 16
ENOUGH = 0.98  # of ‖G‖²: the exact basis captures at most 1/0.98 times as much
TALL = 4  # rows for each column from which G itself is kept out of the decompositions (embeddings, heads)


def exact_basis(gradient: Tensor, rank: int) -> Tensor:
    """The top ``rank`` right singular vectors (in, rank) of G (out, in), by a full SVD, in descending order."""
    return torch.linalg.svd(gradient.to(torch.float32), full_matrices=False).Vh[:rank].T


def randomized_basis(
    gradient: Tensor, rank: int, generator: torch.Generator, warm: Tensor | None = None, power_iterations: int = 2
) -> Tensor:
    """Approximate top ``rank`` right singular vectors (in, rank) of G (out, in), in descending order, fp32.

    Randomized range finder with oversampling (Halko, Martinsson & Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1): Q
    spans G S, and the singular vectors of QᵀG, two products with G in all, are the answer. S spans random ±sums of
    G's rows, which are Gᵀ times a sparse sign matrix (Clarkson & Woodruff, arXiv 1207.6365): half a power iteration
    that costs no product. Iterated, up to ``power_iterations`` times, only while less than ``ENOUGH`` of ‖G‖² is
    captured, which no basis could exceed by much: so gradients, whose energy lies in few directions, need one. The
    second starts from ``warm`` (in, ≤ rank), orthonormal, if that captures more of the sums than was found of G: it
    does where a flat spectrum drifts slowly. Not from the first on: one iteration would leave the new basis leaning
    towards the old one, and overlaps, by which refreshes are scheduled, too high.

    A very tall G, as an embedding has, goes another way (``_tall_basis``).
    """
    out_features, in_features = gradient.shape
    size = min(rank + OVERSAMPLE, out_features, in_features)
    if out_features > TALL * in_features:
        return _tall_basis(gradient, rank, size, generator, warm, power_iterations)
    sums = _row_sums(gradient, size, generator)
    sketch = torch.linalg.qr(sums).Q
    norm = torch.linalg.vector_norm(torch.linalg.vector_norm(gradient, dim=1, dtype=torch.float32))
    for left in reversed(range(power_iterations)):
        range_basis = torch.linalg.qr(project(gradient, None, sketch)).Q
        columns, factor = torch.linalg.qr(project(gradient, range_basis, None).T)
        del range_basis
        turn, values, _ = torch.linalg.svd(factor)
        sketch = columns @ turn
        if left == 0:
            break
        # the memory plan, on the meta device, counts all iterations, the second from an old basis
        share = 0.0 if gradient.is_meta else float((torch.linalg.vector_norm(values[:rank]) / norm).square())
        if not share < ENOUGH:  # 0/0 of a zero gradient too
            break
        if warm is not None and (gradient.is_meta or captured_energy(sums.T, warm) > share):
            sketch = torch.cat((warm, sketch[:, : size - warm.shape[1]]), dim=1)
    return sketch[:, :rank]


def _row_sums(gradient: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Random ±sums (in, size) of the rows of G (out, in): every row is in one of them, fp32."""
    out_features, in_features = gradient.shape
    signs = torch.randint(0, 2, (out_features, 1), generator=generator, device=gradient.device) * 2.0 - 1.0
    sums = torch.zeros(size, in_features, device=gradient.device)
    for start in range(0, out_features, size):
        rows = gradient[start : start + size].to(torch.float32)
        sums[: len(rows)].addcmul_(rows, signs[start : start + size])
    return sums.T


def _tall_basis(
    gradient: Tensor, rank: int, size: int, generator: torch.Generator, warm: Tensor | None, power_iterations: int
) -> Tensor:
    """The basis of a very tall G, met as GᵀG only, so that nothing has its height but G; this squares singular values,
    so that directions below 2⁻¹² of the largest (2⁻²⁴ of its energy) are lost in rounding.

    Power iterations from the columns of ``warm`` and Gaussian ones, and a Rayleigh–Ritz step at the end.
    """
    in_features = gradient.shape[1]
    start = torch.empty(in_features, 0, device=gradient.device) if warm is None else warm
    noise = torch.randn(in_features, size - start.shape[1], generator=generator, device=gradient.device)
    sketch = torch.cat((start, noise * in_features**-0.5), dim=1)
    for _ in range(power_iterations):
        sketch = torch.linalg.qr(_gram_times(gradient, sketch)).Q
    values = torch.linalg.eigh(sketch.T @ _gram_times(gradient, sketch))
    return sketch @ values.eigenvectors[:, -rank:].flip(1)


def _gram_times(gradient: Tensor, columns: Tensor) -> Tensor:
    """GᵀG · ``columns`` / ‖G‖², (in, k): divided so that the squares of small gradients do not underflow."""
    norm = torch.linalg.vector_norm(gradient).to(torch.float32).clamp_min(torch.finfo(torch.float32).tiny)
    total = torch.zeros_like(columns)
    for _, _, tile in fp32_tiles(gradient):
        total.addmm_(tile.T, (tile @ columns).div_(norm))
    return total.div_(norm)


def random_basis(dim: int, rank: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Random orthonormal columns (dim, rank): what a layer starts from if its first decomposition fails."""
    return orthonormal(torch.randn(dim, rank, generator=generator, device=device))


def orthonormal(columns: Tensor) -> Tensor:
    """Orthonormal columns with the same leading spans: what a basis read back from a 4-bit format needs first."""
    return torch.linalg.qr(columns).Q


def overlap(old: Tensor, new: Tensor) -> float:
    """‖P_oldᵀ P_new‖²_F / r in [0, 1] for orthonormal (dim, r): the mean squared cosine of the principal angles. Of two
    ranks r is the smaller: 1 means that one subspace lies in the other.

    Independent of signs and of rotations inside a subspace, which an SVD returns arbitrarily.
    """
    return float(((old.T @ new).square().sum() / min(old.shape[1], new.shape[1])).clamp(0.0, 1.0))


def above_chance(overlap: float, rank: int, dim: int) -> float:
    """The overlap less its expectation for two random subspaces, r/dim: 0 is chance, 1 is the same subspace. Of two
    ranks r is the larger."""
    return 1.0 if rank >= dim else (overlap - rank / dim) / (1.0 - rank / dim)


def first_vector_cosine(old: Tensor, new: Tensor) -> float:
    """Cosine of the angle between the first columns: Q-GaLore's published test (arXiv 2407.08296, §3.2). Its sign is
    the one that the decomposition happens to return."""
    return float(torch.nn.functional.cosine_similarity(old[:, 0], new[:, 0], dim=0))


def captured_energy(gradient: Tensor, basis: Tensor) -> float:
    """‖G P‖² / ‖G‖² for G (out, in) and an orthonormal P (in, r): the share of the gradient that is kept."""
    total, kept = gradient.new_zeros(2, dtype=torch.float32)
    for _, _, tile in fp32_tiles(gradient):  # by rows: one long fp32 sum of squares falls short by parts in 1000
        total += torch.linalg.vector_norm(tile, dim=1).square().sum()
        kept += torch.linalg.vector_norm(tile @ basis, dim=1).square().sum()
    return float(kept / total) if total > 0 else 0.0
