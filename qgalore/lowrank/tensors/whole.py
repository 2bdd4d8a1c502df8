"""A layer's weight under a rule that needs the whole gradient in every step (see :mod:`..rules`)."""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...quant import dispatch, int8
from ..layers.linear import LowRankLinear
from ..rules import Rule
from ..rules.common import Rows, limited
from ..rules.observed import Observation, due
from ..subspace.refresh import RefreshOptions
from ..subspace.schedule import Schedule
from .projected import ProjectedTensor


class WholeTensor(ProjectedTensor):
    """A :class:`LowRankLinear`'s weight whose ``probe`` receives the whole gradient in every step; Δ never does.

    The bases, if the rule has any, follow the schedule of the class above, from the same gradient.
    """

    keeps_whole = True

    def __init__(
        self, name: str, index: int, module: LowRankLinear, schedule: Schedule, options: RefreshOptions, rule: Rule
    ) -> None:
        super().__init__(name, index, module, schedule, options)
        self.rule, self.current_step, self.shape = rule, 0, rule.leaf_shape()
        self.rule_name = rule.name
        self.by_rows = False
        self._observation: Observation | None = None
        self.projected = self.projected and rule.uses_basis
        module.delta.requires_grad_(False)
        # Without hooks nobody else switches it on, and the layer would count as frozen.
        module.probe.requires_grad_(True)

    @property
    def joins(self) -> Hashable:
        """On a GPU, which a few small matrices leave idle one by one. A CPU gains nothing, and there every way of
        stepping has the same bits."""
        weight = self.module.weight
        if not self.rule.joins or int8.kind_of(weight.device) != "cuda":
            return None
        return self.rule.name, weight.shape, self.module.row_parts, weight.device

    def leaves(self) -> list[nn.Parameter]:
        return [self.module.probe]

    def arm(self, step: int) -> None:
        """Always the probe."""
        self.end_record()
        self.current_step = step
        if self.frozen():
            return
        self.listen(True)
        # Not every rule has refreshes, so products are tried again at the pace that refreshes would have.
        if self.module.products is not None and step % self.schedule.gap == 0:
            self.module.products.retry()

    def listen(self, whole: bool) -> None:
        super().listen(True)

    def freed(self) -> bool:
        """Never: it has one leaf."""
        return False

    def gradient(self) -> Tensor | None:
        return self.module.probe.grad

    def awaits_refresh(self) -> bool:
        return self.projected and self.gradient() is not None and self.schedule.due(self.current_step)

    def seeks_first_basis(self) -> bool:
        """Never: every step has a whole gradient, so a first basis need not come before the step's sum."""
        return False

    def turns_moments(self) -> bool:
        return self.projected and self.rule.uses_inner

    def clamped_rank(self) -> int | None:
        return self.rule.clamped_rank()

    def receive(self, gradient: Tensor, own: bool) -> None:
        """The whole gradient stays, for the rule."""
        self.module.probe.grad = gradient
        self.listen(True)

    receive_nothing = receive

    def _adam(self, gradient: Tensor) -> Tensor:
        """The inner optimizer's direction N: at a rate of 1 its step from zero is −N."""
        return self.parts[0].step(gradient, 1.0).neg()

    @torch.no_grad()
    def step(self, lr: float, scale: float, shrink: float, key: tuple[int, int]) -> None:
        """``W ← W(1 − shrink) − lr · scale · N`` with the rule's direction N, limited if that is asked for; drops the
        gradient."""
        gradient = self._fp32_gradient()
        self._write(self.rule.direction(gradient, self.current_step, self._adam), lr, scale, shrink, key)

    @staticmethod
    @torch.no_grad()
    def step_together(
        tensors: "Sequence[WholeTensor]", lr: float, scale: float, shrink: float, keys: Sequence[tuple[int, int]]
    ) -> None:
        """By common products, where there are several and their rule can."""
        if len(tensors) == 1 or tensors[0].joins is None:
            ProjectedTensor.step_together(tensors, lr, scale, shrink, keys)
            return
        rules: list[Any] = [tensor.rule for tensor in tensors]
        gradients = [tensor._fp32_gradient() for tensor in tensors]
        directions = rules[0].directions(rules, gradients, tensors[0].current_step)
        for tensor, direction, key in zip(tensors, directions, keys, strict=True):
            tensor._write(direction, lr, scale, shrink, key)

    def _fp32_gradient(self) -> Tensor:
        gradient = self.gradient()
        assert gradient is not None, f"{self.name} has no gradient"
        return gradient.to(torch.float32).contiguous()

    def _write(self, direction: Rows, lr: float, scale: float, shrink: float, key: tuple[int, int]) -> None:
        """Write the update back, looking at it if that is due, and drop the gradient."""
        module, options, rate = self.module, self.options, -lr * scale
        if limit := self.rule.options.largest_rms:
            direction = limited(direction, module.weight.shape, limit / scale)
        if due(self.current_step):
            looking = Observation(self.name, self.current_step, module)
            looking.momentum_cosine, self.rule.momentum_cosine = self.rule.momentum_cosine, None
            self._observation, direction = looking, looking.watch(direction, rate)
        dispatch.write_back(
            module.weight.detach(),
            module.weight_scale,
            direction,
            s=rate,
            shrink=shrink,
            key=key,
            rounding=options.rounding,
            scales=options.scales,
        )
        self.drop_gradient()

    def observation(self) -> Observation | None:
        found, self._observation = self._observation, None
        return found

    def tensors(self) -> dict[str, Tensor]:
        return {f"rule.{name}": value for name, value in self.rule.tensors().items()}

    def traffic(self, gap: int) -> dict[str, float]:
        """The rule works on whole gradients, which all processes then have for a refresh too."""
        probe = self.module.probe
        return self.sent({"all-reduce Δ gradients": float(probe.numel() * probe.dtype.itemsize)}, gap)
