"""The optimizer: a loop over trained tensors, each of which takes an inner step from zero and writes it back.

Who calls for a step is another matter, and there are three ways, which give the same weights. *Manual*: the caller
says ``step_tensor`` for each tensor whose gradient is complete, then ``close``. *Fused*: an autograd hook does so
inside backward, and the gradient is freed at once. *Deferred*: gradients are kept until ``step()``, so that
accumulation and ``clip_grad_norm_`` work. The hooks of the last two are in ``hooks``.

In a team of processes a gradient is summed over them before anything looks at it.
"""

from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import ConfigError, NumericalError
from ..parallel import ALONE, Team
from ..quant.counter import derive_key
from . import norms
from .hooks import HOOKS, Idle
from .inner.checked import Factory
from .layers.experts import Experts
from .rules.observed import Observation
from .tensors.base import TrainedTensor, attach
from .tensors.whole import WholeTensor

STEPPING = ("deferred", "fused", "manual")
JOINED = 1 << 22  # weights that step together at most: a few small matrices, which would leave a GPU idle one by one


class LowRankOptimizer(Optimizer):
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
        self.tensors, self.stepping, self.seed, self.team = tensors, stepping, seed, team
        self.step_count = 0
        self.events: list[dict[str, Any]] = []
        self.observations: list[Observation] = []
        self.untouched: list[str] = []
        self.stepped: set[str] = set()  # names, in the step that is being taken
        self._prepared: set[str] = set()  # those whose gradient is the whole step's, projected
        self._squares: list[Tensor] = []
        groups: list[dict[str, Any]] = [
            {"name": "lowrank", "scale": scale, "weight_decay": weight_decay},
            {"name": "dense", "scale": 1.0, "weight_decay": weight_decay},
            {"name": "vector", "scale": 1.0, "weight_decay": 0.0},
        ]
        for group in groups:
            own = (tensor for tensor in tensors if tensor.group == group["name"])
            group["params"] = [leaf for tensor in own for leaf in tensor.leaves()]
        self._group_of = {tensor.name: [g["name"] for g in groups].index(tensor.group) for tensor in tensors}
        self._tensor_of = {id(leaf): tensor for tensor in tensors for leaf in tensor.leaves()}
        super().__init__(groups, {"lr": lr})
        self._scratches = attach(tensors, factory, part_elements)
        self.idle = Idle(team)
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

    # One tensor at a time: what the ways of stepping have in common.

    def tensors_of(self, where: nn.Module | Iterable[Tensor]) -> list[TrainedTensor]:
        """The trained tensors with a leaf among the parameters of ``where``, each once, in the order in which a
        backward pass completes them: the last parameter first."""
        parameters = where.parameters() if isinstance(where, nn.Module) else where
        found = (self._tensor_of.get(id(parameter)) for parameter in reversed(list(parameters)))
        return list(dict.fromkeys(tensor for tensor in found if tensor is not None))

    def accumulate_in_fp32(self, on: bool = True) -> None:
        """Whether autograd adds the gradients of a step's micro-batches in fp32, whatever a leaf's dtype is. A single
        micro-batch needs none of it: bf16 gradients then keep their size."""
        for group in self.param_groups:
            for leaf in group["params"]:
                leaf.grad_dtype = torch.float32 if on else leaf.dtype

    @torch.no_grad()
    def prepare_tensor(self, tensor: TrainedTensor, first_from: int | None = None) -> bool:
        """Sum the gradient of ``tensor`` over the team and, where a basis is due, find it and project. False, and
        nothing done, if no process has a gradient.

        ``first_from``: the process in whose share alone a very first basis is sought, before anything is summed; None:
        in the sum. All processes must ask for the same tensors in the same order. Raises :class:`NumericalError` if a
        whole gradient is not finite.
        """
        if first_from is None and not self.idle.someone_has(tensor):
            return False
        # Processes sum projected gradients. Without a first basis there are none, so one process finds it beforehand.
        if first_from is not None and tensor.awaits_refresh() and tensor.seeks_first_basis():
            self.refresh_tensor(tensor, first_from)
        if self.team.size > 1:
            tensor.sum_over(self.team)
        self.prepare_summed(tensor)
        return True

    @torch.no_grad()
    def prepare_summed(self, tensor: TrainedTensor) -> None:
        """:meth:`prepare_tensor` for a ``tensor`` whose gradient is the whole team's already."""
        if tensor.awaits_refresh():
            self.refresh_tensor(tensor)
        self._prepared.add(tensor.name)

    def apply_tensor(self, tensor: TrainedTensor) -> None:
        """One inner step of a prepared ``tensor``, written back; its gradient is dropped.

        Raises :class:`NumericalError`, with nothing done, if the gradient is not finite.
        """
        self.apply_tensors([tensor])

    @torch.no_grad()
    def apply_tensors(self, tensors: list[TrainedTensor]) -> None:
        """:meth:`apply_tensor` for each of ``tensors``, all of which are looked at before the first moves."""
        self._check_finite(tensors)
        for some in together(tensors):
            self._apply(some)

    def step_tensor(self, tensor: TrainedTensor, first_from: int | None = None) -> bool:
        """:meth:`prepare_tensor` and, if it has a gradient, :meth:`apply_tensor`."""
        prepared = self.prepare_tensor(tensor, first_from)
        if prepared:
            self.apply_tensor(tensor)
        return prepared

    def step_tensors(self, tensors: Iterable[TrainedTensor]) -> None:
        """:meth:`step_tensor` for all of ``tensors``, such as a block's. All are prepared and looked at before the
        first moves: a GPU is then waited for once, and not once for each. Small matrices of one shape step together."""
        self.apply_tensors([tensor for tensor in tensors if self.prepare_tensor(tensor)])

    def refresh_tensor(self, tensor: TrainedTensor, own_of: int | None = None) -> None:
        """Find a due basis from the whole gradient that ``tensor`` holds: the sum of all processes', or that of process
        ``own_of`` alone, which then decides for all."""
        # A decomposition of inf or nan may hang or raise, so the gradient is looked at first.
        whole = [leaf.grad for leaf in tensor.leaves() if tensor.is_whole(leaf) and leaf.grad is not None]
        if not all(bool(torch.isfinite(torch.linalg.vector_norm(gradient))) for gradient in whole):
            self.complain(tensor)
        tensor.deciding = self.team.led_by(own_of or 0)
        if (record := tensor.refresh(self.step_count, own_of is not None)) is not None:
            self.events.append(record)

    def _apply(self, tensors: Sequence[TrainedTensor]) -> None:
        """Step tensors that may step together (:func:`together`). Never sees a gradient that is not finite."""
        group = self.param_groups[self._group_of[tensors[0].name]]
        rates = group["lr"], group["scale"], group["lr"] * group["weight_decay"]
        keys = [derive_key(self.seed, self.step_count, tensor.index) for tensor in tensors]
        if len(tensors) == 1:
            tensors[0].step(*rates, keys[0])
        else:
            WholeTensor.step_together([t for t in tensors if isinstance(t, WholeTensor)], *rates, keys)
        for tensor in tensors:
            self.stepped.add(tensor.name)
            if (observation := tensor.observation()) is not None:
                self.observations.append(observation)

    def close(self) -> None:
        """End the step: what has no gradient in it is ``untouched``, and the leaves of the next one are armed."""
        self.untouched = [tensor.name for tensor in self.tensors if tensor.name not in self.stepped]
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
        self.refresh()
        pending = [tensor for tensor in self.tensors if tensor.gradient() is not None]
        # All are checked before the first is stepped, so that a bad gradient leaves no weight changed.
        self._check_finite(pending)
        for some in together(pending):
            self._apply(some)
        self.close()
        return loss

    @torch.no_grad()
    def refresh(self) -> None:
        """Sum the gradients here over the team, find the bases that are due from them, and project.

        ``step()`` does this itself; call it before ``clip_grad_norm_`` so that the norm is that of projected gradients.
        """
        if self.hooks is not None:
            self.hooks.refresh()
            return
        for tensor in self.tensors:
            if tensor.name not in self._prepared | self.stepped:
                self.prepare_tensor(tensor)

    @torch.no_grad()
    def clip(self, parameters: Iterable[Tensor], limit: float) -> float:
        """``clip_grad_norm_`` over ``parameters`` and over the rows that other processes hold; the norm before it."""
        return norms.clip(parameters, self.tensors, limit, self.team)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients. They are always set to None: a zeroed gradient would keep its memory."""
        for tensor in self.tensors:
            tensor.drop_gradient()

    def _check_finite(self, tensors: list[TrainedTensor]) -> None:
        # The first tensor of a step begins the sum of squares of which ``grad_norm`` is the root.
        if tensors and not self.stepped:
            self._squares = []
        squares = norms.squares(tensors, self.team)
        # One value leaves the device for all, since each that does makes a GPU wait.
        if squares and not torch.isfinite(torch.stack([square.to(squares[0].device) for square in squares])).all():
            self.complain(next(t for t, square in zip(tensors, squares, strict=True) if not torch.isfinite(square)))
        self._squares += squares

    def complain(self, tensor: TrainedTensor) -> NoReturn:
        """Raise :class:`NumericalError` for a gradient that is not finite."""
        partial = f"; {len(self.stepped)} of {len(self.tensors)} tensors were already stepped" if self.stepped else ""
        raise NumericalError(
            f"the gradient of {tensor.name} is not finite in optimizer step {self.step_count} (counted from 0){partial}"
        )

    # What it can tell, and what a checkpoint holds.

    @property
    def grad_norm(self) -> float:
        """L2 norm over all gradients seen since the step began (or of the last step, right after it)."""
        return float(torch.stack(self._squares).sum().sqrt()) if self._squares else 0.0

    @property
    def inside_step(self) -> bool:
        """Whether some tensors have taken a step that is not closed yet."""
        return bool(self.stepped)

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
        """Everything beside the model's own tensors: inner states, fp32 masters, schedules, the step count."""
        return {
            "step_count": self.step_count,
            "slots": {tensor.name: tensor.state() for tensor in self.tensors},
            "groups": [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`; values keep their dtypes. Raises ``ValueError`` if the tensors differ."""
        missing = {tensor.name for tensor in self.tensors} ^ set(state["slots"])
        if missing:
            raise ValueError(f"optimizer state and model differ in {len(missing)} tensors, for example {min(missing)}")
        self.step_count = state["step_count"]
        for tensor in self.tensors:
            tensor.load_state(state["slots"][tensor.name])
            tensor.arm(self.step_count)
        for group, saved in zip(self.param_groups, state["groups"], strict=True):
            group.update(saved)


def together(tensors: Iterable[TrainedTensor]) -> list[list[TrainedTensor]]:
    """``tensors`` in groups that may step together, of no more than ``JOINED`` weights, in the order of their first."""
    groups: list[list[TrainedTensor]] = []
    open_groups: dict[Hashable, list[TrainedTensor]] = {}
    for tensor in tensors:
        group = None if tensor.joins is None else open_groups.get(tensor.joins)
        if group is None or (len(group) + 1) * tensor.stored.numel() > JOINED:
            groups.append(group := [])
            open_groups[tensor.joins] = group
        group.append(tensor)
    return groups
