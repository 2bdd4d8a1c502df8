"""What a refresh tells about a layer besides the decision: how far the subspace turned, the gradient's spectrum, and
whether 8-bit moments and int8 weights still resolve what happens to them.

Everything is measured on one layer at the moment of its refresh, on samples where a tensor is large, so that it costs
a small part of the decomposition beside it. A value that cannot be had (no old basis, fp32 moments, floating-point
weights) is None. Nothing here changes training or draws from its random streams.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...quant.int8 import dequantize
from ..layers.linear import LowRankLinear
from .moments import BLOCK
from .search import LinAlgError
from .sides import squared_lengths

VERSION = 2  # of a row of subspace.jsonl; rows before this module existed carry none
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
SAMPLE_CODES = 1 << 14  # 8-bit codes looked at in each moment: a share is known to 0.4 % or better
SAMPLE_LINES = 8  # rows (columns for a left basis) of the weight that are compared before and after a merge
MIN_FREE = 16  # dimensions outside the subspace below which rounding noise cannot be told from the update


def quantiles(values: Tensor) -> list[float]:
    """The 0, 25, 50, 75 and 100 % quantiles of ``values`` (n,), rounded to five decimals: a record stays short."""
    return [round(value, 5) for value in torch.quantile(values.float(), _points(values.device)).tolist()]


@cache
def _points(device: torch.device) -> Tensor:
    """Copied to ``device`` once: a copy makes a GPU wait."""
    return torch.tensor(QUANTILES, dtype=torch.float32, device=device)


def angle_cosines(old: Tensor, new: Tensor) -> list[float] | None:
    """Quantiles of the cosines of the principal angles between two subspaces with orthonormal bases (dim, r).

    The cosines are the singular values of C = P_oldᵀ P_new (Björck & Golub 1973), taken here as the roots of the
    eigenvalues of CᵀC, which costs a fraction of an SVD; cosines under 10⁻³ are therefore only known to be that small.
    None if the eigenvalues do not converge.
    """
    product = old.T @ new
    # If the rank has grown, there are as many angles as the smaller basis has vectors.
    if product.shape[0] < product.shape[1]:
        product = product.T
    try:
        squares = torch.linalg.eigvalsh(product.T @ product)
    except LinAlgError:
        return None
    return quantiles(squares.clamp(0.0, 1.0).sqrt())


def captured(gradient: Tensor, basis: Tensor) -> tuple[float, list[float] | None]:
    """(‖G P‖² / ‖G‖², quantiles of σᵢ / σ₁) for G (out, in) and an orthonormal P (in, r).

    σᵢ are the lengths of the columns of G P, which are G's singular values when P holds its singular vectors, as the
    projector returns them. None for a zero G P.
    """
    squares = squared_lengths(gradient, basis)
    length = torch.linalg.vector_norm(gradient, dtype=torch.float32)
    norm, kept, first = torch.stack((length, squares.sum(), squares.max())).tolist()
    total = norm * norm
    share = kept / total if total > 0 else 0.0
    spectrum = quantiles((squares / first).sqrt()) if first > 0 else None
    return share, spectrum


def mean_of_sides(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One row from one row for each side that has a basis: numbers and lists are averaged, None stays None."""

    def mean(values: list[Any]) -> Any:
        if values[0] is None:
            return None
        if isinstance(values[0], list):
            return [sum(parts) / len(parts) for parts in zip(*values, strict=True)]
        return sum(values) / len(values)

    return {key: mean([row[key] for row in rows]) for key in rows[0]}


def moments(states: Iterable[dict[str, Any]]) -> dict[str, float | None]:
    """Shares of zero and of saturated codes in the 8-bit moments of ``states`` (the inner optimizer's, blockwise:
    ``state1`` uint8 with ``qmap1``, and 2).

    Zeros of the first moment stand still; zeros of the second give steps as large as ``eps`` allows. Saturated codes
    are those of the largest magnitude: each block of 256 has one by construction, a share of 0.0039.
    """
    found = [state for state in states if getattr(state.get("state1"), "dtype", None) == torch.uint8]
    shares: dict[str, float | None] = {}
    for number in (1, 2):
        names = [f"{part}{number}" for part in ("state", "qmap", "absmax")]
        held = [_count(*(state[name] for name in names)) for state in found if names[0] in state]
        zero, saturated, total = (sum(counts) for counts in zip(*held, strict=True)) if held else (0, 0, 0)
        shares[f"moment{number}_zero"] = zero / total if total else None
        shares[f"moment{number}_saturated"] = saturated / total if total else None
    return shares


def _count(codes: Tensor, code: Tensor, absmax: Tensor) -> tuple[int, int, int]:
    """Among a sample of ``codes``: zeros, saturated ones, all. A block of zeros has absmax 0 and any codes."""
    # An odd step visits every place in a block, whose length is even.
    step = max(1, codes.numel() // SAMPLE_CODES) | 1
    places = torch.arange(0, codes.numel(), step, device=codes.device)
    dead = absmax[places // BLOCK] == 0
    values = code[codes.view(-1)[places].int()]
    saturated = (values == code.max()) | ((values == code.min()) & (values < 0))
    zero = dead | (values == 0)
    zeros, ends = torch.stack((zero.sum(), (saturated & ~dead).sum())).tolist()
    return zeros, ends, len(places)


@dataclass(frozen=True)
class Lines:
    """A few rows (``dim`` 0) or columns (1) of an int8 weight as they were before a merge, with all their scales."""

    dim: int
    start: int
    integers: Tensor
    scale: Tensor


def lines_before(stored: LowRankLinear, number: int) -> Lines | None:
    """Copy sample lines of ``stored``, chosen by ``number``; None if its weight is not int8.

    Lines lie along the side that has a basis, so that the update of each one lies in that basis' span.
    """
    if stored.weight_scale is None:
        return None
    dim = 0 if stored.right is not None else 1
    count = min(SAMPLE_LINES, stored.weight.shape[dim])
    start = number * 7919 % (stored.weight.shape[dim] - count + 1)
    integers, scale = _lines(stored.weight, stored.weight_scale, dim, start, count)
    return Lines(dim, start, integers.clone(), scale.clone())


def _lines(weight: Tensor, scale: Tensor, dim: int, start: int, count: int) -> tuple[Tensor, Tensor]:
    """Integers and scales of ``count`` rows; or of ``count`` columns, with the scales of the groups they lie in."""
    weight, scale = weight.detach(), scale.detach()
    if dim == 0:
        return weight[start : start + count], scale[start : start + count]
    group = weight.shape[1] // scale.shape[1]
    return weight[:, start : start + count], scale[:, start // group : (start + count - 1) // group + 1]


def _values(lines: Lines, width: int, groups: int) -> Tensor:
    """Dequantized lines, fp32 (lines, length along the basis)."""
    if lines.dim == 0:
        return dequantize(lines.integers, lines.scale)
    size = width // groups
    owner = torch.arange(lines.start, lines.start + lines.integers.shape[1], device=lines.scale.device) // size
    return (lines.integers.float() * lines.scale.float()[:, owner - lines.start // size]).T


def noise_share(change: Tensor, before: Tensor, basis: Tensor) -> float | None:
    """The part of ‖change‖² that is rounding noise, in [0, 1], for a change of lines (k, n) and a basis (n, r).

    An update lies in the span of the stored basis and a decay along ``before`` (k, n); what is left of the change
    outside both is noise, and noise knows no direction: E‖noise‖² = ‖outside‖² · n / (n − r). Half means that noise
    and update are of one size. None without a change or if fewer than ``MIN_FREE`` dimensions lie outside.
    """
    length, rank = basis.shape
    total = float(change.square().sum())
    factor, failed = torch.linalg.cholesky_ex(basis.T @ basis)
    if total == 0 or length - rank < MIN_FREE or int(failed):
        return None

    def outside(lines: Tensor) -> Tensor:
        return lines - (basis @ torch.cholesky_solve(basis.T @ lines.T, factor)).T

    # What is left outside the basis is noise and decay. Decay lies along the weight, so that part is taken out too.
    noise, weight = outside(change), outside(before)
    along = weight.square().sum()
    if along > 0:
        noise = noise - weight * ((noise * weight).sum() / along)
    return min(1.0, float(noise.square().sum()) / total * length / (length - rank))


def int8_change(stored: LowRankLinear, before: Lines | None) -> dict[str, float | None]:
    """What the merge since :func:`lines_before` did to the sampled lines: share of integers that changed, share of
    groups that were given a new scale, and :func:`noise_share`. All None for a weight that is not int8."""
    if before is None:
        return {"int8_changed": None, "int8_rescaled": None, "int8_noise_share": None}
    here = stored.weight.device  # a streamed weight is in host memory again
    before = Lines(before.dim, before.start, before.integers.to(here), before.scale.to(here))
    count = before.integers.shape[before.dim]
    basis = stored.right if before.dim == 0 else stored.left
    assert stored.weight_scale is not None, "a weight was int8 before a merge and is not after it"
    assert basis is not None, "the sampled lines lie along a side without a basis"
    now = _lines(stored.weight, stored.weight_scale, before.dim, before.start, count)
    after = Lines(before.dim, before.start, *now)
    shape = stored.weight.shape[1], stored.weight_scale.shape[1]
    old, new = _values(before, *shape), _values(after, *shape)
    return {
        "int8_changed": float((after.integers != before.integers).float().mean()),
        "int8_rescaled": float((after.scale != before.scale).float().mean()),
        "int8_noise_share": noise_share(new - old, old, basis.columns()),
    }
