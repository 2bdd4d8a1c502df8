"""SinkGD (arXiv 2502.06742, algorithm 2): the gradient, its rows and columns normalised in turn; no state.

    X ← G;   five times:  every row of X to length √in,  then every column to length √out
    W ← W (1 − lr·wd) − lr · scale · X

Both normalisations bring the root mean square of X to 1, so the iteration settles, as Sinkhorn's does for sums. The
paper sets no floor under the lengths; here it is far below any gradient, so that a gradient's size never matters.
"""

import torch
from torch import Tensor

from .common import Adam, Rows, Rule
from .orthogonal import TINY

ITERATIONS = 5


def sinkhorn_rms_(matrix: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """Scale rows and columns of ``matrix`` (out, in), fp32, in place and in turn to a root mean square of 1, and return
    it. Zeros stay zero."""
    for _ in range(iterations):
        for dim in (1, 0):
            length = torch.linalg.vector_norm(matrix, dim=dim, keepdim=True)
            matrix.div_(length.mul_(matrix.shape[dim] ** -0.5).clamp_min_(TINY))
    return matrix


class SinkGD(Rule):
    """Doubly normalised SGD."""

    name = "sinkgd"
    uses_inner = False

    def direction(self, gradient: Tensor, step: int, adam: Adam) -> Rows:
        update = sinkhorn_rms_(gradient)
        return lambda a, b: update[a:b].clone()
