"""Finding a projection basis, and comparing two of them. All in fp32, on one gradient at a time.

A basis for the right side of G (out, in) spans the dominant right singular vectors; the left side is the right side of
Gᵀ, so every function here speaks of the right.
"""

import torch
from torch import Tensor

METHODS = ("randomized", "exact")
OVERSAMPLE = 16


def exact_basis(gradient: Tensor, rank: int) -> Tensor:
    """The top ``rank`` right singular vectors (in, rank) of G (out, in), by a full SVD, in descending order."""
    return torch.linalg.svd(gradient, full_matrices=False).Vh[:rank].T


def randomized_basis(
    gradient: Tensor, rank: int, generator: torch.Generator, warm: Tensor | None = None, power_iterations: int = 2
) -> Tensor:
    """Approximate top ``rank`` right singular vectors (in, rank) of G (out, in), in descending order.

    Randomized range finder with power iterations (Halko, Martinsson & Tropp, arXiv 0909.4061, algorithm 4.4), started
    from the columns of ``warm`` (in, ≤ rank) plus Gaussian ones, with oversampling; a Rayleigh–Ritz step (QR of the
    sketch, SVD of its small factor) then orders the vectors and drops the surplus ones.
    """
    out_features, in_features = gradient.shape
    size = min(rank + OVERSAMPLE, out_features, in_features)
    start = torch.empty(in_features, 0, device=gradient.device) if warm is None else warm
    noise = torch.randn(in_features, size - start.shape[1], generator=generator, device=gradient.device)
    sketch = torch.cat((start, noise * in_features**-0.5), dim=1)
    for _ in range(power_iterations):
        range_basis = torch.linalg.qr(gradient @ sketch).Q
        sketch = torch.linalg.qr(gradient.T @ range_basis).Q
    factor = torch.linalg.qr(gradient @ sketch, mode="r").R
    return sketch @ torch.linalg.svd(factor).Vh[:rank].T


def random_basis(dim: int, rank: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Random orthonormal columns (dim, rank): what a layer starts from if its first decomposition fails."""
    return orthonormal(torch.randn(dim, rank, generator=generator, device=device))


def orthonormal(columns: Tensor) -> Tensor:
    """Orthonormal columns with the same leading spans: what a basis read back from a 4-bit format needs first."""
    return torch.linalg.qr(columns).Q


def overlap(old: Tensor, new: Tensor) -> float:
    """‖P_oldᵀ P_new‖²_F / r in [0, 1] for orthonormal (dim, r): the mean squared cosine of the principal angles.

    Independent of signs and of rotations inside a subspace, which an SVD returns arbitrarily.
    """
    return float(((old.T @ new).square().sum() / new.shape[1]).clamp(0.0, 1.0))


def above_chance(overlap: float, rank: int, dim: int) -> float:
    """The overlap less its expectation for two random subspaces, r/dim: 0 is chance, 1 is the same subspace."""
    return 1.0 if rank >= dim else (overlap - rank / dim) / (1.0 - rank / dim)


def first_vector_cosine(old: Tensor, new: Tensor) -> float:
    """|cos| of the angle between the first columns: Q-GaLore's published test (arXiv 2407.08296, §3.2) without its
    dependence on the sign that the SVD happens to return."""
    return float(torch.nn.functional.cosine_similarity(old[:, 0], new[:, 0], dim=0).abs())


def captured_energy(gradient: Tensor, basis: Tensor) -> float:
    """‖G P‖² / ‖G‖² for G (out, in) and an orthonormal P (in, r): the share of the gradient that is kept."""
    total = gradient.square().sum()
    return float((gradient @ basis).square().sum() / total) if total > 0 else 0.0
