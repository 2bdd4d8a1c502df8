"""Error feedback: int8 weights rounded to the nearest, what that leaves out given to the momentum.

Stochastic rounding spends noise on updates smaller than the grid. ECO (arXiv 2601.22101) rounds to the nearest instead
and adds the error e = (W + U) − Q(W + U) to the momentum so that the steps to come make it up; no memory is added.
Its factor for SGD with momentum, m ← βm + (1 − β)g and U = −ηm, is (1 − 1/β)/η. For Adam, and with its correction of
the bias, which is large in the first steps, we derive it so. What m_t alone moves in the steps after t is

    U_{t+1} + U_{t+2} + … = −s · lr/d · S_t · m_t,    S_t = Σ_{k ≥ 1} β₁ᵏ / (1 − β₁^{t+k}),    d = √v̂_t + ε,

if lr and v̂ stay as they are (s is the scale of updates; S_t falls to β₁/(1 − β₁), ECO's factor). To move e more:

    m_t ← m_t − e · d / (s · lr · S_t).

With lr and d constant W + U_{t+1} + U_{t+2} + … then moves exactly as without rounding, and W stays beside it by what
the momentum holds. lr and v̂ do change: a growing lr (warm-up) makes up too much, a falling one too little.

A low-rank moment holds Lᵀ e R̂ and no more: what the error has outside the subspace is lost in every step. The update
has nothing there, so this is noise of the rounding that nothing corrects; moments in 8 bits round the rest again.
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import ConfigError
from . import moments
from .inner import BUILTIN

NAME = "feedback"


@lru_cache(maxsize=64)
def reach(beta: float, step: int) -> float:
    """S_t = Σ_{k ≥ 1} βᵏ / (1 − β^(t+k)) for ``step`` t ≥ 0, to 10⁻⁹ of itself."""
    total, power, bias = 0.0, beta, beta ** (step + 1)
    while power > 1e-9 * (1.0 - beta) * total:
        total += power / (1.0 - bias)
        power, bias = power * beta, bias * beta
    return total


def check(inner: str | type[Optimizer], options: dict) -> None:
    """Raise :class:`ConfigError` for an optimizer whose momentum cannot carry an error."""
    if inner not in BUILTIN:
        raise ConfigError(f"weight_rounding 'feedback' needs Adam's moments: inner is {inner!r}; use one of {BUILTIN}")
    if not options["betas"][0] > 0:
        raise ConfigError("betas[0] is 0: there is no momentum that weight_rounding 'feedback' could use; give 0.9 say")


def inject(inner: Optimizer, leaf: Tensor, error: Tensor, scale: float) -> None:
    """Let the first moment of ``leaf`` make up for ``error``, fp32 of its shape, in the steps to come.

    ``inner`` has just stepped ``leaf``, whose step times ``scale`` went into the weight.
    """
    state, group = inner.state[leaf], inner.param_groups[0]
    first, second = (
        next(name for name in names if name in state) for names in (moments.FIRST_MOMENTS, moments.SECOND_MOMENTS)
    )
    if leaf.is_meta:  # the memory plan's: what is held at once
        [torch.empty(leaf.shape, device="meta") for _ in range(2)]
        return
    (beta1, beta2), step = group["betas"][:2], int(state["step"])
    factor = group["lr"] * scale * reach(beta1, step)
    if factor == 0.0:  # a rate of zero has moved nothing
        return
    divisor = moments.read(state, second).div_(1.0 - beta2**step).sqrt_().add_(group["eps"])
    moments.write(state, first, moments.read(state, first).addcmul_(error, divisor, value=-1.0 / factor))
