"""The nearest matrix with orthonormal columns, by a few matrix products: what Muon does to its momentum.

For B = Q Σ Vᵀ the result is close to Q Vᵀ: every singular value becomes about 1, every singular vector stays. An odd
polynomial p(x) = a x + b x³ + c x⁵ of the singular values needs only products,

    X ← a X + (b A + c A²) X,        A = X Xᵀ  (of the short side)

and a few such polynomials in turn bring all of [10⁻³, 1] near 1. Two sequences are here:

- ``polar_express`` (arXiv 2505.16932): each polynomial is the best one for the interval that the one before it left.
- ``newton_schulz`` (Muon, Jordan et al. 2024): one polynomial, repeated; values end between 0.68 and 1.21.
"""

import torch
from torch import Tensor

from ...quant.int8 import kind_of

# Minimax polynomials for sign(x) on [10⁻³, 1] and what it becomes, each divided by a safety factor (paper, §4.4): a
# value that rounding put slightly above 1 must not grow.
_SAFETY = 1.01
_MINIMAX = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
)
SEQUENCES = {
    "polar_express": tuple((a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in _MINIMAX),
    "newton_schulz": ((3.4445, -4.7750, 2.0315),) * 6,
}
ITERATIONS = 5
TINY = 1e-30  # what a norm is kept above: a zero matrix stays zero


def orthogonalize(
    matrices: Tensor, iterations: int = ITERATIONS, sequence: str = "polar_express", dtype: torch.dtype | None = None
) -> Tensor:
    """Replace the singular values of ``matrices`` by values near 1. Returns a fresh fp32 tensor of the same shape.

    matrices: (m, n), or (b, m, n) for a batch, any floating dtype. It is not changed.
    iterations: how many polynomials are applied, 1 to 6. After 5 of ``polar_express`` every singular value above
      10⁻³ of the Frobenius norm lies between 0.84 and 1.13.
    dtype: of the products; None takes bf16 on a GPU and fp32 on a CPU. The normalisation before them is in fp32.
    """
    if not 1 <= iterations <= len(SEQUENCES[sequence]):
        raise ValueError(f"iterations is {iterations}; it must be between 1 and {len(SEQUENCES[sequence])}")
    dtype = dtype or (torch.bfloat16 if kind_of(matrices.device) == "cuda" else torch.float32)
    x = matrices.to(torch.float32)
    x = (x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp_min_(TINY)).to(dtype)

    # The product X Xᵀ should have the short side, and a polynomial of singular values does not mind a transposition.
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    product_and_sum = torch.addmm if x.ndim == 2 else torch.baddbmm  # sums in fp32, and rounds once
    for a, b, c in SEQUENCES[sequence][:iterations]:
        gram = x @ x.mT
        polynomial = product_and_sum(gram, gram, gram, beta=b, alpha=c)
        x = product_and_sum(x, polynomial, x, beta=a)
    return (x.mT if tall else x).to(torch.float32).contiguous()


def flop(rows: int, columns: int, iterations: int = ITERATIONS) -> float:
    """Floating-point operations of :func:`orthogonalize` for one matrix, an addition and a multiplication being two:
    X Xᵀ and the product with X are 2 s² l each, A² is 2 s³, for sides s ≤ l. Sums of matrices are not counted."""
    short, long = sorted((rows, columns))
    return iterations * (4.0 * short * short * long + 2.0 * short**3)
