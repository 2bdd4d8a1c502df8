"""Which side of a gradient is projected, and the two maps: G → R = LᵀGR̂ and Δ → L Δ R̂ᵀ.

L is (out, r) or the identity, R̂ is (in, r) or the identity; None stands for the identity.
"""

from collections.abc import Callable

from torch import Tensor

PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")


def basis_sides(out_features: int, in_features: int, proj_type: str) -> tuple[bool, bool]:
    """(left?, right?): the sides of an (out, in) weight that get a basis.

    ``std`` puts it on the shorter dimension and ``reverse_std`` on the longer one, as GaLore names them (arXiv
    2403.03507, §4.2 and its code); a square matrix counts as tall. Raises ``ValueError`` for an unknown name.
    """
    tall = out_features >= in_features
    sides = {
        "std": (not tall, tall),
        "reverse_std": (tall, not tall),
        "left": (True, False),
        "right": (False, True),
        "full": (True, True),
    }
    if proj_type not in sides:
        raise ValueError(f"proj_type {proj_type!r} is not one of {PROJ_TYPES}")
    return sides[proj_type]


def project(gradient: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """R = Lᵀ G R̂ for a gradient (out, in)."""
    if left is not None:
        gradient = left.T @ gradient
    return gradient if right is None else gradient @ right


def update_rows(delta: Tensor, left: Tensor | None, right: Tensor | None, scale: float) -> Callable[[int, int], Tensor]:
    """A function (a, b) → rows a … b−1 of ``scale · L Δ R̂ᵀ``, so that the (out, in) product never exists whole."""
    if left is not None and right is not None:  # the small product first
        left, right = left @ delta, right
        return lambda a, b: (left[a:b] @ right.T).mul_(scale)
    if left is not None:
        return lambda a, b: (left[a:b] @ delta).mul_(scale)
    if right is not None:
        return lambda a, b: (delta[a:b] @ right.T).mul_(scale)
    return lambda a, b: delta[a:b] * scale
