"""SCALE (arXiv 2506.16659, algorithm 1) on hidden matrices: the gradient, normalised for each output neuron; no state.

    W_i ← W_i − lr · scale · √in · G_i / ‖G_i‖        for every row i of W (out, in)

The paper writes weights as (in, out) and normalises *columns*, "along the output dimension": with PyTorch's (out, in)
these are rows, and the authors' code divides each by its root mean square, hence √in. (Columns of the (out, in) matrix,
one norm for each input, are another method.)

Not here: SCALE also normalises the embedding, and gives the output head momentum. In this package those tensors are
trained by the inner optimizer, under every rule.
"""

from torch import Tensor

from .common import Adam, Rows, Rule, unit_rms_rows


class Scale(Rule):
    """Row-normalised SGD."""

    name = "scale"
    uses_inner = False

    def direction(self, gradient: Tensor, step: int, adam: Adam) -> Rows:
        return lambda a, b: unit_rms_rows(gradient[a:b])
