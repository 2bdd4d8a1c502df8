"""The optimizer: a loop over trained tensors, each of which takes an inner step from zero and writes it back.

Who calls for a step is another matter, and there are three ways, which give the same weights. *Manual*: the caller
says ``step_tensor`` for each tensor whose gradient is complete, then ``close``. *Fused*: an autograd hook does so
inside backward, and the gradient is freed at once. *Deferred*: gradients are kept until ``step()``, so that
accumulation and ``clip_grad_norm_`` work. The hooks of the last two are in ``hooks``.

In a team of processes a gradient is summed over them before anything looks at it.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import ConfigError
from ..parallel import ALONE, Team
from . import clipping
from .hooks import HOOKS
from .inner.checked import Factory
from .layers.experts import Experts
from .tensor_steps import GROUPS, TensorSteps
from .tensors import owning
from .tensors.attaching import attach
from .tensors.base import TrainedTensor

STEPPING = ("deferred", "fused", "manual")


class LowRankOptimizer(TensorSteps, Optimizer):
    """Steps every trainable tensor of a converted model. Build it with :func:`factory.optimizer`, which documents them.

    It is an ordinary optimizer to learning-rate schedulers: ``param_groups`` are ``lowrank``, ``dense`` and ``vector``
    (norms and biases, without weight decay), and ``lr`` is read from them in every step. ``events`` collects a record
    of each refresh decision, and ``observations`` those of updates that were looked at. ``grad_norm`` is the norm of
    the gradients of the step that is being taken or was last taken, Δ-gradients for low-rank layers.
    """

    def __init__(
        self,
        tensors: list[TrainedTensor],
        *,
        lr: float,
        weight_decay: float,
        scale: float,
        factory: Factory,
        stepping: str,
        seed: int,
        part_elements: int,
        team: Team = ALONE,
    ) -> None:
        TensorSteps.__init__(self, tensors, seed, team)
        self.stepping = stepping
        self.untouched = [tensor.name for tensor in tensors]  # before the first step all
        scales, decays = (scale, 1.0, 1.0), (weight_decay, weight_decay, 0.0)
        groups: list[dict[str, Any]] = [
            {"name": name, "scale": own_scale, "weight_decay": decay}
            for name, own_scale, decay in zip(GROUPS, scales, decays, strict=True)
        ]
        for group in groups:
            own = (tensor for tensor in tensors if tensor.group == group["name"])
            group["params"] = [leaf for tensor in own for leaf in tensor.leaves()]
        Optimizer.__init__(self, groups, {"lr": lr})
        self._scratches = attach(tensors, factory, part_elements)
        for leaf in (leaf for tensor in tensors for leaf in tensor.leaves()):
            leaf.requires_grad_(True)  # a hook needs it; arm() then leaves it on for one leaf of each layer
        self.hooks = HOOKS[stepping](self) if stepping in HOOKS else None
        for tensor in tensors:
            tensor.arm(0)

    def watch(self, experts: Iterable[Experts]) -> None:
        """In a team: hear of experts without tokens here, whose gradients others may have."""
        for module in experts:
            self.idle.watch(module, self.tensors)
            if self.hooks is not None:
                module.tell_idle = self.hooks.nothing_came

    def close(self) -> None:
        """End the step, in all processes: what has no gradient in it is ``untouched``, and the leaves of the next one
        are armed."""
        self.untouched = [tensor.name for tensor in self.tensors if tensor.name not in self.stepped]
        self.share_outcomes()
        self._end()

    def skip(self) -> None:
        """Close the step without an update, dropping its gradients (see ``inside_step`` for what it cannot undo)."""
        self.zero_grad()
        self._end()

    def _end(self) -> None:
        for scratch in self._scratches:
            scratch.release()
        self.stepped.clear()
        self._prepared.clear()
        self._records.clear()
        self._spread.clear()
        if self.hooks is not None:
            self.hooks.close()
        self.step_count += 1
        for tensor in self.tensors:
            tensor.arm(self.step_count)

    # All tensors together: the interface of an optimizer.

    @torch.no_grad()
    def step(self, closure=None):
        """Step every tensor that holds a gradient, and close the step, of which that is all if it was fused. A closure
        is evaluated first, as in any torch optimizer.

        Raises :class:`NumericalError`, before any of these weights has changed, if a gradient is not finite.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.move(self.pending())
        self.close()
        return loss

    @torch.no_grad()
    def pending(self) -> list[TrainedTensor]:
        """The tensors that hold a gradient, projected. All are looked at before the first is stepped, so that one that
        is not finite leaves no weight changed: it raises :class:`NumericalError`."""
        self.refresh()
        found = [tensor for tensor in self.tensors if self.waits_for_step(tensor)]
        self.look_at(found)
        return found

    @torch.no_grad()
    def refresh(self) -> None:
        """Sum the gradients here over the team, find the bases that are due from them, and project.

        ``step()`` does this itself; call it before ``clip_grad_norm_`` so that the norm is that of projected gradients.
        """
        if self.hooks is not None:
            self.hooks.refresh()
            return
        for tensor in self.tensors:
            if tensor.name not in self._prepared and tensor.name not in self.stepped:
                self.prepare_tensor(tensor)

    @torch.no_grad()
    def clip(self, parameters: Iterable[Tensor], limit: float) -> float:
        """``clip_grad_norm_`` over ``parameters`` and what went to other processes; the norm before it."""
        owned = [tensor for tensor in self.tensors if tensor.owner is not None and self.waits_for_step(tensor)]
        return clipping.clip(parameters, owned, limit, self.team)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients. They are always set to None: a zeroed gradient would keep its memory."""
        for tensor in self.tensors:
            tensor.drop_gradient()

    # What it can tell, and what a checkpoint holds.

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Read by ``torch.amp.GradScaler``, which is thereby refused: bases would be sought in scaled gradients, which
        may overflow, and fused stepping would not undo the scale."""
        raise ConfigError("fp16 with a GradScaler is refused; use bfloat16, which needs none (Trainer: bf16=True)")

    def refresh_counts(self) -> tuple[int, int]:
        """(refreshes done, refreshes skipped: those a schedule of fixed gaps would have done besides)."""
        counts = [tensor.refresh_counts(self.step_count) for tensor in self.tensors]
        done, fixed = (sum(numbers) for numbers in zip(*counts, strict=True))
        return done, max(0, fixed - done)

    def waiting(self) -> int:
        """How many layers' refreshes were due in an earlier step and still wait for a gradient: a mixture's experts
        that get no tokens."""
        return sum(tensor.waits(self.step_count) for tensor in self.tensors)

    def state_dict(self) -> dict[str, Any]:
        """Everything beside the model's own tensors: inner states, fp32 masters, schedules, the step count.

        What one process keeps for all is a :class:`Kept` there. All processes then ask for it together.
        """
        return {
            "step_count": self.step_count,
            "slots": owning.states(self.tensors, self.team),
            "groups": [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`; values keep their dtypes. Raises ``ValueError`` if the tensors differ."""
        missing = {tensor.name for tensor in self.tensors} ^ set(state["slots"])
        if missing:
            raise ValueError(f"optimizer state and model differ in {len(missing)} tensors, for example {min(missing)}")
        self.step_count = state["step_count"]
        for tensor in self.tensors:
            load = tensor.restore if tensor.elsewhere else tensor.load_state
            load(state["slots"][tensor.name])
            tensor.arm(self.step_count)
        for group, saved in zip(self.param_groups, state["groups"], strict=True):
            group.update(saved)
