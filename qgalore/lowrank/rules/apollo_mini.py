"""APOLLO-Mini (arXiv 2412.05270, §4.2): APOLLO with rank 1 and one factor for the whole matrix.

    s = ‖N‖ / ‖R‖,    W ← W − lr · scale · s · G,    scale = √128

The factor makes up for what a single random direction underestimates; the paper's heuristic is √128 and the authors'
settings say 128, of which their code takes the root.
"""

from torch import Tensor

from .apollo import Apollo
from .common import channel_scaling


class ApolloMini(Apollo):
    """A moment of two vectors and one factor for each matrix."""

    name = "apollo_mini"

    def wanted_rank(self) -> int:
        return 1

    def scaling(self, normalised: Tensor, projected: Tensor) -> Tensor:
        return channel_scaling(normalised, projected, (0, 1))
