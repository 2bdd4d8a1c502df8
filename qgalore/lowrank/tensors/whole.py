"""A low-rank layer's slot under a rule that needs the whole gradient in every step (see :mod:`.rules`)."""

from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...parallel.shards import is_shared
from ...quant import dense as dense_grid
from ...quant import int8
from ..layers.linear import LowRankLinear
from ..rules import RULES, Rule, RuleOptions
from ..rules.apollo import Apollo
from ..rules.common import Rows
from ..subspace.ranks import AutoRankSlot
from ..subspace.schedule import Schedule
from .projected import LowRankSlot, RefreshOptions, Slot
from .sharded import ShardSlot

GALORE = "galore"  # not one of the rules here: it needs Δ's gradient alone
NAMES = (GALORE, *RULES)
GALORE_SCALE = 0.25
FULL_GRADIENTS = ("free", "keep")


class RuleSlot(LowRankSlot):
    """A :class:`LowRankLinear`'s weight whose ``probe`` receives the full gradient in every step; Δ never does.

    The bases, if the rule has any, follow the schedule of the class above, from the same gradient.
    """

    def __init__(
        self,
        name: str,
        index: int,
        module: LowRankLinear,
        schedule: Schedule,
        options: RefreshOptions,
        rule: Rule,
    ) -> None:
        super().__init__(name, index, module, schedule, options)
        self.rule, self.current_step, self.shape = rule, 0, rule.leaf_shape()
        self.by_rows = False
        self.projected = self.projected and rule.uses_basis
        module.delta.requires_grad_(False)

    def leaves(self) -> list[nn.Parameter]:
        return [self.module.probe]

    def arm(self, step: int) -> None:
        self._finish_record()
        self.current_step = step
        self._listen()
        if self.module.products is not None and step % self.schedule.gap == 0:  # not every rule has refreshes
            self.module.products.retry()

    def _listen(self) -> None:
        self.module.probe.requires_grad_(True)
        self.module.delta.requires_grad_(False)

    def gradient(self) -> Tensor | None:
        return self.module.probe.grad

    def awaits_refresh(self) -> bool:
        """Whether a gradient is here from which a due basis can be found."""
        return self.projected and self.gradient() is not None and self.schedule.due(self.current_step)

    @torch.no_grad()
    def refresh(self, step: int) -> dict[str, Any] | None:
        """As for GaLore, but the full gradient stays, for the rule."""
        gradient = self.gradient()
        row = super().refresh(step)
        self.drop_gradient()
        self.module.probe.grad = gradient
        self._listen()
        return row

    def _adam(self, gradient: Tensor) -> Tensor:
        """The inner optimizer's direction N: at a rate of 1 its step from zero is −N."""
        return self.parts[0].step(gradient, 1.0).neg()

    @torch.no_grad()
    def step(self, lr: float, scale: float, shrink: float, key: tuple[int, int]) -> None:
        """``W ← W(1 − shrink) − lr · scale · N`` with the rule's direction N; drops the gradient."""
        gradient = self.gradient().to(torch.float32).contiguous()
        rows = self.rule.direction(gradient, self.current_step, self._adam)
        write_rows(self.module, lambda a, b: rows(a, b).mul_(-lr * scale), shrink, key, self.options)
        self.drop_gradient()

    def tensors(self) -> dict[str, Tensor]:
        return {f"rule.{name}": value for name, value in self.rule.tensors().items()}


def write_rows(module: LowRankLinear, rows: Rows, shrink: float, key: tuple[int, int], options: RefreshOptions) -> None:
    """``W ← W · (1 − shrink) + rows`` in the layer's own format, rounded once, int8 as ``options`` say."""
    weight = module.weight.detach()
    if module.weight_scale is None:
        dense_grid.write_back(weight, rows, shrink=shrink, key=key)
    else:
        how = {"rounding": options.rounding, "scales": options.scales}
        int8.write_back(weight, module.weight_scale, rows, shrink=shrink, key=key, **how)


def awaits_refresh(slot: Slot) -> bool:
    """Whether ``slot`` holds a full gradient that a due basis is to be found from."""
    if isinstance(slot, RuleSlot):
        return slot.awaits_refresh()
    return isinstance(slot, LowRankSlot) and slot.module.probe.grad is not None


def turns_moments(slot: Slot) -> bool:
    """Whether the slot's inner optimizer has moments in a subspace that is refreshed."""
    return isinstance(slot, LowRankSlot) and slot.projected and (not isinstance(slot, RuleSlot) or slot.rule.uses_inner)


def default_scale(rule: str) -> float:
    return GALORE_SCALE if rule == GALORE else RULES[rule].default_scale


def check(rule: str, rank: int | None, stepping: str, full_gradients: str, modules: dict[str, LowRankLinear]) -> None:
    """Raise :class:`ConfigError` for an unknown rule, and for what a rule cannot work with."""
    if rule not in NAMES:
        raise ConfigError(f"rule is {rule!r}; it must be one of {NAMES}")
    if full_gradients not in FULL_GRADIENTS:
        raise ConfigError(f"full_gradients is {full_gradients!r}; it must be one of {FULL_GRADIENTS}")
    if rule == "apollo" and (rank is None or rank < 1):
        raise ConfigError(f"rank is {rank!r}; rule 'apollo' needs the rank of its random projection, at least 1")
    if rule != "apollo" and rank is not None:
        raise ConfigError(
            f"rank is {rank!r}, and rule {rule!r} does not read it: a layer's rank is set by convert; leave it out here"
        )
    if rule == GALORE:
        return
    if free := [name for name, module in modules.items() if module.max_rank is not None]:
        raise ConfigError(
            f"rule {rule!r} needs a fixed rank, and {len(free)} layers were converted with rank='auto', for example "
            f"{free[0]}; convert the model with a number, or use rule='galore'"
        )
    if stepping == "deferred" and full_gradients == "free":
        raise ConfigError(
            f"rule {rule!r} needs the full gradient of every layer in every step, and stepping 'deferred' would keep "
            "all of them at once, as many values as the layers have weights; use stepping='fused', or accept the "
            "memory with full_gradients='keep'"
        )
    idle = [name for name, m in modules.items() if not (m.left is None and m.right is None)]
    if idle and not RULES[rule].uses_basis:
        raise ConfigError(
            f"rule {rule!r} uses no stored basis, but {len(idle)} layers have one, for example {idle[0]}; convert the "
            "model with rank=None, which stores none"
        )


def _galore_kind(module: LowRankLinear) -> type[LowRankSlot]:
    if is_shared(module.weight):
        return ShardSlot
    return LowRankSlot if module.max_rank is None else AutoRankSlot


def make(
    rule: str, modules: dict[str, LowRankLinear], schedules: list[Schedule], find: RefreshOptions, of: RuleOptions
) -> list[LowRankSlot]:
    """A slot for each layer under ``rule``. Prints a line where a rank had to be clamped."""
    if rule == GALORE:
        return [
            _galore_kind(module)(name, index, module, schedules[index], find)
            for index, (name, module) in enumerate(modules.items())
        ]
    slots = [
        RuleSlot(name, index, module, schedules[index], find, RULES[rule](module, index, of))
        for index, (name, module) in enumerate(modules.items())
    ]
    clamped = [s for s in slots if isinstance(s.rule, Apollo) and s.rule.rank < s.rule.wanted_rank()]
    if clamped:
        print(
            f"note: rank {of.rank} is above the smaller side of {len(clamped)} layers, for example {clamped[0].name}; "
            f"{clamped[0].rule.rank} is used there",
            flush=True,
        )
    return slots
