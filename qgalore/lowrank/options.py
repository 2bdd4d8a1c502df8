"""The options of the low-rank optimizer, checked one by one and completed."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from .. import combinations
from ..errors import ConfigError
from ..quant.int8 import ROUNDINGS, SCALES
from ..schedule_defaults import THRESHOLDS, longest_gap
from .inner import checked
from .optimizer import STEPPING
from .subspace.moments import POLICIES as MOMENTS
from .subspace.policies import POLICIES
from .subspace.search import METHODS
from .tensors.base import TrainedTensor

CHOICES = {
    "stepping": STEPPING,
    "projector": METHODS,
    "policy": POLICIES,
    "moments": MOMENTS,
    "weight_rounding": ROUNDINGS,
    "weight_scales": SCALES,
}


def require(condition: bool, name: str, value: Any, rule: str) -> None:
    if not condition:
        raise ConfigError(f"{name} is {value!r}; it must be {rule}")


def check_choices(**given: str) -> None:
    """Raise :class:`ConfigError` for a value that is none of its ``CHOICES``."""
    for name, value in given.items():
        require(value in CHOICES[name], name, value, f"one of {CHOICES[name]}")


def check_numbers(*, lr: float, update_proj_gap: int, queue_size: int, energy: float, gamma_proj: float) -> None:
    """Raise :class:`ConfigError` for a number outside its range."""
    require(lr > 0 and math.isfinite(lr), "lr", lr, "a positive number")
    require(update_proj_gap >= 1, "update_proj_gap", update_proj_gap, "at least 1")
    require(queue_size >= 1, "queue_size", queue_size, "at least 1")
    require(0 < energy <= 1, "energy", energy, "in (0, 1]")
    require(gamma_proj >= 1, "gamma_proj", gamma_proj, "at least 1")


def schedule_options(
    policy: str,
    update_proj_gap: int,
    cos_threshold: float | None,
    gamma_proj: float,
    queue_size: int,
    max_gap: int | None,
) -> dict[str, Any]:
    """What a lazy schedule is made with. None takes the policy's own threshold, and the longest gap that follows from
    ``update_proj_gap``. Raises :class:`ConfigError` if gaps would begin above their limit."""
    if message := combinations.gaps(combinations.ARGUMENTS, max_gap, update_proj_gap):
        raise ConfigError(message)
    return {
        "cos_threshold": THRESHOLDS.get(policy) if cos_threshold is None else cos_threshold,
        "gamma_proj": gamma_proj,
        "queue_size": queue_size,
        "max_gap": max_gap or longest_gap(update_proj_gap),
    }


@dataclass(frozen=True)
class InnerSteps:
    """The optimizer that steps each leaf. ``name``: as given, by name or as a class."""

    name: str | type[Optimizer]
    factory: checked.Factory
    betas: tuple[float, float]
    eps: float

    @classmethod
    def of(
        cls,
        name: str | type[Optimizer],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        options: dict[str, Any],
    ) -> "InnerSteps":
        """Raises :class:`ConfigError` for an unknown name and for options that the class does not take. Classes other
        than our own take neither ``betas`` nor ``eps``."""
        if name in checked.BUILTIN:
            options = {"betas": betas, "eps": eps, **options}
        made = checked.make_factory(name, lr, options)
        return cls(name, made, options.get("betas", betas), options.get("eps", eps))

    def check(self, tensors: Iterable[TrainedTensor], rotates: bool) -> None:
        """Try it on each device of ``tensors``. ``rotates``: whether moments follow a basis as it turns.

        Raises :class:`ConfigError` for an optimizer that cannot work on Δ (see ``inner.checked``).
        """
        tensors = list(tensors)
        for device in {tensor.leaves()[0].device for tensor in tensors}:
            checked.check_ignores_value(self.factory, device)
            if rotates and any(tensor.turns_moments() for tensor in tensors):
                checked.check_rotates(self.factory, device)
            if isinstance(self.name, str) and self.name in checked.CODED:
                checked.check_coded(self.name, self.factory, self.betas, self.eps, device)
