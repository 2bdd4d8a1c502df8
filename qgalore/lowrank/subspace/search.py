"""Finding a projection basis, and comparing two of them: in fp32, on one gradient of any float dtype at a time.

A basis for the right side of G (out, in) spans the dominant right singular vectors; the left side is the right side of
Gᵀ, so every function here speaks of the right.
"""

import torch
from torch import Tensor

from .sides import fp32_tiles, project

LinAlgError = torch.linalg.LinAlgError  # pyright: ignore[reportPrivateImportUsage] - public, if in no list of exports
METHODS = ("randomized", "exact")
OVERSAMPLE = 16
TALL = 4  # rows for each column from which G itself is kept out of the decompositions (embeddings, heads)
SAMPLES = 32  # sums of rows by which two bases are compared
# On gradients of a 7B-wide Llama all further iterations would gain at most 0.27 of what the last half one did: where
# that was less than 7.4 % of the energy, less than 2 % is missing (docs/lab/first_edition.md, "Bases").
GAIN = 0.074


def exact_basis(gradient: Tensor, rank: int) -> Tensor:
    """The top ``rank`` right singular vectors (in, rank) of G (out, in), by a full SVD, in descending order. On a GPU,
    whose SVD takes minutes for a large matrix, by :func:`gram_basis`."""
    if gradient.device.type == "cuda":
        return gram_basis(gradient, rank)
    return torch.linalg.svd(gradient.to(torch.float32), full_matrices=False).Vh[:rank].T


def gram_basis(gradient: Tensor, rank: int) -> Tensor:
    """:func:`exact_basis` by the symmetric eigenproblem of G's shorter side, in fp64: squaring loses the half of fp64's
    digits, and what is left is more than fp32 has."""
    whole = gradient.to(torch.float64)
    if gradient.shape[0] >= gradient.shape[1]:
        return torch.linalg.eigh(whole.T @ whole).eigenvectors.flip(1)[:, :rank].float()
    left = torch.linalg.eigh(whole @ whole.T).eigenvectors.flip(1)[:, :rank]
    basis, factor = torch.linalg.qr(whole.T @ left)
    return (basis * torch.where(factor.diagonal() < 0, -1.0, 1.0)).float()


def randomized_basis(
    gradient: Tensor,
    rank: int,
    generator: torch.Generator,
    warm: Tensor | None = None,
    power_iterations: int = 2,
) -> Tensor:
    """Approximate top ``rank`` right singular vectors (in, rank) of G (out, in), in descending order, fp32.

    Randomized range finder with oversampling (Halko, Martinsson & Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1): Q
    spans G S, and the singular vectors of QᵀG, two products with G in all, are the answer. S spans random ±sums of
    G's rows, which are Gᵀ times a sparse sign matrix (Clarkson & Woodruff, arXiv 1207.6365): half a power iteration
    that costs no product. Iterated, up to ``power_iterations`` times, only while the step from S to Q has gained more
    than ``GAIN`` of the energy. The second starts from ``warm`` (in, ≤ rank), orthonormal, if that captures more: it
    does where a flat spectrum drifts slowly. Not from the first on: one iteration would leave the new basis leaning
    towards the old one, and overlaps, by which refreshes are scheduled, too high.

    A very tall G, as an embedding has, goes another way (``_tall_pass``).

    Signs are chosen so that no column has a negative sum. Otherwise they would hang on the random sums, and successive
    bases of a gradient that stays the same would have cosines of both signs.
    """
    out_features, in_features = gradient.shape
    size = min(rank + OVERSAMPLE, out_features, in_features)
    one_pass = _tall_pass if out_features > TALL * in_features else _pass
    sums = _row_sums(gradient, size, generator)
    # G is divided by a number about as large as its elements, so that squares of small gradients do not underflow.
    # It is a power of two, by which nothing is rounded.
    unit = torch.exp2(torch.frexp(sums.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)).exponent)
    # The first subspace is that of the random sums, in which large singular vectors already weigh more.
    found = torch.linalg.qr(sums.T).Q
    for left in reversed(range(power_iterations)):
        before, found, factor = one_pass(gradient, found, unit)
        energy = factor.square().sum()
        # A pass that has gained little says that another would gain less. The comparison is negated so that NaN ends
        # the loop too.
        last = left == 0 or not energy - before > GAIN * energy
        if last or warm is not None:  # a pass between others only needs the span
            found = found @ in_order(factor)[0]
        if last:
            break
        if warm is not None and _better(warm, found[:, :rank], _row_sums(gradient, SAMPLES, generator)):
            found = torch.cat((warm, found[:, : size - warm.shape[1]]), dim=1)
    # An SVD leaves the signs of its vectors open. A rule for them makes successive bases comparable.
    found = found[:, :rank]
    return found * torch.where(found.sum(dim=0) < 0, -1.0, 1.0)


def _row_sums(gradient: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Random ±sums (size, in) of the rows of G (out, in): every row is in one of them, fp32."""
    out_features, in_features = gradient.shape
    signs = torch.randint(0, 2, (out_features, 1), generator=generator, device=gradient.device) * 2.0 - 1.0
    sums = torch.zeros(size, in_features, device=gradient.device)
    for start in range(0, out_features, size):
        rows = gradient[start : start + size].to(torch.float32)
        sums[: len(rows)].addcmul_(rows, signs[start : start + size])
    return sums


def in_order(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors and values of a square fp32 ``factor``, in descending order, by the symmetric eigenproblem
    of F Fᵀ in fp64. A GPU takes seconds for the SVD of a thousand columns, whose sweeps wait for each other. Squaring
    loses half of the digits; fp64 keeps as many then as an SVD in fp32 has."""
    wide = factor.to(torch.float64)
    energies, turn = torch.linalg.eigh(wide @ wide.T)
    return turn.flip(1).to(torch.float32), energies.flip(0).clamp_min(0.0).sqrt().to(torch.float32)


def _pass(gradient: Tensor, columns: Tensor, unit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """‖G S‖² for S, the orthonormal ``columns`` (in, k), then B (in, k) and F (k, k) with QᵀG = Fᵀ Bᵀ for Q and B
    orthonormal bases of the range of G S and of GᵀQ; all of G / ``unit``. F's left singular vectors turn B into the
    right singular vectors of QᵀG."""
    # G S, and how much of G's energy the subspace that was given holds.
    image = project(gradient, None, columns).div_(unit)
    before = torch.linalg.vector_norm(image, dim=0).square().sum()
    range_basis = torch.linalg.qr(image).Q
    del image
    rows = project(gradient, range_basis, None).div_(unit)
    del range_basis
    # The small triangular factor has the singular values of the long QᵀG.
    basis, factor = torch.linalg.qr(rows.T)
    return before, basis, factor


def _tall_pass(gradient: Tensor, columns: Tensor, unit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same for a very tall G, by Nyström's approximation of GᵀG, Z (YᵀY)⁻¹ Zᵀ with Y = G S and Z = GᵀY (Tropp,
    Yurtsever, Udell & Cevher, arXiv 1706.05736): nothing has G's height but G. This squares singular values, so that
    directions below 2⁻¹² of the largest (2⁻²⁴ of its energy) are lost in rounding.
    """
    # YᵀY and Z are summed over tiles of rows, so that Y, which is as tall as G, never exists.
    gram = columns.new_zeros(columns.shape[1], columns.shape[1])
    image = torch.zeros_like(columns)
    for _, _, tile in fp32_tiles(gradient):
        rows = (tile @ columns).div_(unit)
        gram.addmm_(rows.T, rows)
        image.addmm_(tile.T, rows)
    image.div_(unit)
    energies, turn = torch.linalg.eigh(gram)
    before = gram.diagonal().sum()
    floor = (torch.finfo(torch.float32).eps * before).clamp_min(torch.finfo(torch.float32).tiny)
    # S is turned so that the columns of Y are orthonormal. Those that hold nothing but rounding errors become small.
    basis, factor = torch.linalg.qr(image @ turn.div_(energies.clamp_min(floor).sqrt_()))
    return before, basis, factor


def _better(one: Tensor, other: Tensor, samples: Tensor) -> bool:
    """Whether ``one`` captures more of random combinations of G's rows (n, in) than ``other``."""
    norms = [torch.linalg.vector_norm(samples @ basis) for basis in (one, other)]
    return bool(norms[0] > norms[1])


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
    """Cosine of the angle between the first columns: Q-GaLore's published test (arXiv 2407.08296, §3.2).

    ``old`` is the basis as it is stored, of any length, and not one that a QR has made orthonormal: that may mirror
    columns, and the sign would be the QR's. The columns of ``new`` have the signs that their decomposition gave them.
    Rounding to int4 turns a vector by about 0.1 radians, which lowers the cosine by less than 0.01.
    """
    return float(torch.nn.functional.cosine_similarity(old[:, 0], new[:, 0], dim=0))


def captured_energy(gradient: Tensor, basis: Tensor) -> float:
    """‖G P‖² / ‖G‖² for G (out, in) and an orthonormal P (in, r): the share of the gradient that is kept."""
    total, kept = gradient.new_zeros(2, dtype=torch.float32)
    for _, _, tile in fp32_tiles(gradient):  # by rows: one long fp32 sum of squares falls short by parts in 1000
        total += torch.linalg.vector_norm(tile, dim=1).square().sum()
        kept += torch.linalg.vector_norm(tile @ basis, dim=1).square().sum()
    return float(kept / total) if total > 0 else 0.0
