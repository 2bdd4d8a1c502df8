"""The optimizer: for every trained tensor an inner step from zero, then a merge into what is stored.

Two ways to step give the same weights. *Deferred*: gradients of Δ are kept until ``step()``, so accumulation and
``clip_grad_norm_`` work. *Fused*: each tensor steps inside backward, as soon as its gradient is complete, and the
gradient is freed at once; ``step()`` then only closes the step.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import ConfigError, NumericalError
from ..quant.counter import derive_key
from . import inner as inner_optimizers
from .linear import LowRankLinear
from .moments import POLICIES
from .projector import METHODS
from .schedule import LazySchedule, staggered_first_gaps
from .slots import DenseSlot, LowRankSlot, RefreshOptions, Slot

STEPPING = ("deferred", "fused")
SIMILARITIES = ("overlap", "first_vector")


class LowRankOptimizer(Optimizer):
    """Steps every trainable tensor of a converted model. Build it with :func:`optimizer`, which documents the options.

    It is an ordinary optimizer to learning-rate schedulers: ``param_groups`` are ``lowrank``, ``dense`` and ``vector``
    (norms and biases, without weight decay), and ``lr`` is read from them in every step. ``events`` collects a record
    of each refresh decision; ``grad_norm`` is the norm of the gradients of the step that is being taken or was last
    taken, Δ-gradients for low-rank layers.
    """

    def __init__(
        self,
        low_rank: list[LowRankSlot],
        dense: list[DenseSlot],
        *,
        lr: float,
        weight_decay: float,
        scale: float,
        factory: inner_optimizers.Factory,
        stepping: str,
        seed: int,
    ) -> None:
        self.slots: list[Slot] = [*low_rank, *dense]
        self.stepping, self.seed = stepping, seed
        self.step_count = 0
        self.events: list[dict[str, Any]] = []
        self._stepped: set[str] = set()
        self._squares: list[Tensor] = []
        self.untouched: list[str] = []
        groups = [
            {"name": "lowrank", "slots": low_rank, "scale": scale, "weight_decay": weight_decay},
            {
                "name": "dense",
                "slots": [s for s in dense if s.parameter.ndim > 1],
                "scale": 1.0,
                "weight_decay": weight_decay,
            },
            {"name": "vector", "slots": [s for s in dense if s.parameter.ndim < 2], "scale": 1.0, "weight_decay": 0.0},
        ]
        self._group_of = {slot.name: index for index, g in enumerate(groups) for slot in g["slots"]}
        for group in groups:
            group["params"] = [leaf for slot in group.pop("slots") for leaf in slot.leaves()]
        super().__init__(groups, {"lr": lr})
        self._attach_leaves(factory)
        for slot in self.slots:
            for leaf in slot.leaves():
                leaf.requires_grad_(True)  # a hook needs it; arm() then leaves it on for one leaf of each layer
                leaf.register_post_accumulate_grad_hook(lambda leaf, slot=slot: self._gradient_arrived(slot, leaf))
            slot.arm(0)

    def _attach_leaves(self, factory: inner_optimizers.Factory) -> None:
        """One scratch buffer for each device, as large as the largest leaf: only one leaf is real at a time."""
        sizes: dict[torch.device, int] = {}
        for slot in self.slots:
            device = slot.leaves()[0].device
            sizes[device] = max(sizes.get(device, 0), slot.shape.numel())
        scratch = {device: torch.zeros(size, device=device) for device, size in sizes.items()}
        for slot in self.slots:
            slot.attach(scratch[slot.leaves()[0].device], factory)

    @property
    def grad_norm(self) -> float:
        """L2 norm over all gradients seen since the step began (or of the last step, right after it)."""
        return float(torch.stack(self._squares).sum().sqrt()) if self._squares else 0.0

    @property
    def inside_step(self) -> bool:
        """Whether some tensors have taken a step that ``step()`` has not closed yet (fused stepping only)."""
        return bool(self._stepped)

    def _gradient_arrived(self, slot: Slot, leaf: Tensor) -> None:
        """Autograd hook: ``leaf.grad`` now holds a micro-batch's contribution."""
        if self.stepping == "fused":
            if slot.name in self._stepped:
                raise RuntimeError(
                    f"{slot.name} received a second gradient before step(): fused stepping takes one backward pass a "
                    "step. For gradient accumulation build the optimizer with stepping='deferred'."
                )
            self._begin()
            self._refresh_if_due(slot)
            self._check_finite(slot)
            self._apply(slot)
        elif isinstance(slot, LowRankSlot) and slot.schedule.refreshes == 0:
            # Every layer's first basis comes from the first micro-batch, so that their full gradients never coexist.
            self._refresh_if_due(slot)

    def _begin(self) -> None:
        if not self._stepped:
            self._squares = []

    def _refresh_if_due(self, slot: Slot) -> None:
        if not isinstance(slot, LowRankSlot) or slot.module.probe.grad is None:
            return
        if not torch.isfinite(torch.linalg.vector_norm(slot.module.probe.grad)):
            self._complain(slot)
        self.events.append(slot.refresh(self.step_count))

    def _complain(self, slot: Slot) -> None:
        partial = f"; {len(self._stepped)} of {len(self.slots)} tensors were already stepped" if self._stepped else ""
        raise NumericalError(
            f"the gradient of {slot.name} is not finite in optimizer step {self.step_count} (counted from 0){partial}"
        )

    def _check_finite(self, slot: Slot) -> None:
        square = torch.linalg.vector_norm(slot.gradient(), dtype=torch.float32).square()
        if not torch.isfinite(square):
            self._complain(slot)
        self._squares.append(square)

    def _apply(self, slot: Slot) -> None:
        """One inner step and its merge. Never sees a gradient that is not finite."""
        group = self.param_groups[self._group_of[slot.name]]
        delta = slot.inner_step(slot.gradient(), group["lr"])
        key = derive_key(self.seed, self.step_count, slot.index)
        slot.merge(delta, group["scale"], group["lr"] * group["weight_decay"], key)
        slot.drop_gradient()
        self._stepped.add(slot.name)

    @torch.no_grad()
    def refresh(self) -> None:
        """Deferred stepping: find the bases that are due, from the whole step's gradient, and project it.

        ``step()`` does this itself; call it before ``clip_grad_norm_`` so that the norm is that of projected gradients.
        """
        due = [slot for slot in self.slots if isinstance(slot, LowRankSlot) and slot.module.probe.grad is not None]
        if due:  # look at every gradient before a basis changes: a step that fails must leave no trace
            for slot in self.slots:
                for leaf in slot.leaves():
                    if leaf.grad is not None and not torch.isfinite(torch.linalg.vector_norm(leaf.grad)):
                        self._complain(slot)
        for slot in due:
            self._refresh_if_due(slot)

    @torch.no_grad()
    def step(self, closure=None):
        """Take the step (deferred) or close it (fused). A closure is evaluated first, as in any torch optimizer.

        Raises :class:`NumericalError`, before any weight has changed, if a kept gradient is not finite.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.refresh()
        pending = [slot for slot in self.slots if slot.gradient() is not None]
        if pending:
            self._begin()
        for slot in pending:
            self._check_finite(slot)
        for slot in pending:
            self._apply(slot)
        self.untouched = [slot.name for slot in self.slots if slot.name not in self._stepped]
        self._stepped.clear()
        self.step_count += 1
        for slot in self.slots:
            slot.arm(self.step_count)
        return loss

    def skip(self) -> None:
        """Close the step without an update, dropping its gradients (see ``inside_step`` for what it cannot undo)."""
        self._stepped.clear()
        self.zero_grad()
        self.step_count += 1
        for slot in self.slots:
            slot.arm(self.step_count)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients. They are always set to None: a zeroed gradient would keep its memory."""
        for slot in self.slots:
            slot.drop_gradient()

    def refresh_counts(self) -> tuple[int, int]:
        """(refreshes done, refreshes skipped: those a schedule of fixed gaps would have done besides)."""
        slots = [slot for slot in self.slots if isinstance(slot, LowRankSlot) and slot.projected]
        done = sum(slot.schedule.refreshes for slot in slots)
        fixed = sum(slot.schedule.fixed_refreshes(self.step_count) for slot in slots)
        return done, max(0, fixed - done)

    def state_dict(self) -> dict[str, Any]:
        """Everything beside the model's own tensors: inner states, fp32 masters, schedules, the step count."""
        return {
            "step_count": self.step_count,
            "slots": {slot.name: _slot_state(slot) for slot in self.slots},
            "groups": [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`; values keep their dtypes. Raises ``ValueError`` if the tensors differ."""
        missing = {slot.name for slot in self.slots} ^ set(state["slots"])
        if missing:
            raise ValueError(f"optimizer state and model differ in {len(missing)} tensors, for example {min(missing)}")
        self.step_count = state["step_count"]
        for slot in self.slots:
            _load_slot_state(slot, state["slots"][slot.name])
            slot.arm(self.step_count)
        for group, saved in zip(self.param_groups, state["groups"], strict=True):
            group.update(saved)


def _slot_state(slot: Slot) -> dict[str, Any]:
    state = {"inner": dict(slot.inner.state.get(slot.leaf, {})), "extra": slot.tensors()}
    if isinstance(slot, LowRankSlot):
        state["schedule"] = slot.schedule.state()
    return state


def _load_slot_state(slot: Slot, state: dict[str, Any]) -> None:
    device = slot.leaf.device
    slot.inner.state[slot.leaf] = {
        # torch keeps Adam's step count on the CPU on purpose; other tensors belong beside the leaf
        name: value.to(device) if torch.is_tensor(value) and name != "step" else value
        for name, value in state["inner"].items()
    }
    if not state["inner"]:
        slot.inner.state.pop(slot.leaf)
    for name, value in slot.tensors().items():
        value.copy_(state["extra"][name])
    if isinstance(slot, LowRankSlot):
        slot.schedule = LazySchedule(**state["schedule"])


def _require(condition: bool, name: str, value: Any, rule: str) -> None:
    if not condition:
        raise ConfigError(f"{name} is {value!r}; it must be {rule}")


def optimizer(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.0,
    scale: float = 0.25,
    inner: str | type[Optimizer] = "adamw8bit",
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    inner_options: dict[str, Any] | None = None,
    stepping: str = "deferred",
    update_proj_gap: int = 200,
    cos_threshold: float = 0.4,
    gamma_proj: float = 2.0,
    queue_size: int = 5,
    max_gap: int | None = None,
    stagger: bool = True,
    projector: str = "randomized",
    similarity: str = "overlap",
    moments: str = "rotate",
    seed: int = 0,
) -> LowRankOptimizer:
    """The Q-GaLore optimizer for a model prepared by ``qgalore.convert`` (unconverted tensors train dense).

    Steps of low-rank layers are ``W ← W(1 − lr·weight_decay) + scale · L Δ R̂ᵀ`` with Δ the inner optimizer's step.

    inner: ``adamw8bit`` (bitsandbytes; our own on a CPU), ``adamw``, or any ``torch.optim.Optimizer`` class or dotted
      path whose step does not depend on the parameter's value (checked); ``betas`` and ``eps`` go to the two named
      ones, others take ``inner_options``.
    stepping: ``deferred`` or ``fused`` (see the module). Fused refuses accumulation and cannot clip the global norm.
    update_proj_gap, cos_threshold, gamma_proj, queue_size, max_gap: the lazy schedule, in optimizer steps; ``max_gap``
      defaults to 16 · update_proj_gap; cos_threshold > 1 never stretches a gap.
    stagger: spread the refreshes after the first over the gap; projector: ``randomized`` | ``exact``;
    similarity: ``overlap`` (chance removed) | ``first_vector``; moments: ``rotate`` | ``keep`` | ``reset``.

    Raises :class:`ConfigError` for bad values, for an optimizer that cannot work on Δ, and if nothing is trainable.
    """
    _require(lr > 0 and math.isfinite(lr), "lr", lr, "a positive number")
    _require(stepping in STEPPING, "stepping", stepping, f"one of {STEPPING}")
    _require(projector in METHODS, "projector", projector, f"one of {METHODS}")
    _require(similarity in SIMILARITIES, "similarity", similarity, f"one of {SIMILARITIES}")
    _require(moments in POLICIES, "moments", moments, f"one of {POLICIES}")
    _require(update_proj_gap >= 1, "update_proj_gap", update_proj_gap, "at least 1")
    _require(queue_size >= 1, "queue_size", queue_size, "at least 1")
    _require(gamma_proj >= 1, "gamma_proj", gamma_proj, "at least 1")
    options = dict(inner_options or {})
    if inner in inner_optimizers.BUILTIN:
        options = {"betas": tuple(betas), "eps": eps, **options}
    factory = inner_optimizers.make_factory(inner, lr, options)
    modules = {name: m for name, m in model.named_modules() if isinstance(m, LowRankLinear)}
    gaps = staggered_first_gaps(len(modules), update_proj_gap) if stagger else [update_proj_gap] * len(modules)
    find = RefreshOptions(method=projector, similarity=similarity, moments=moments, seed=seed)
    lazy = {"cos_threshold": cos_threshold, "gamma_proj": gamma_proj, "queue_size": queue_size}
    lazy["max_gap"] = max_gap or 16 * update_proj_gap
    low_rank = [
        LowRankSlot(name, index, module, LazySchedule(update_proj_gap, gaps[index], **lazy), find)
        for index, (name, module) in enumerate(modules.items())
    ]
    owned = {id(leaf) for slot in low_rank for leaf in slot.leaves()}
    trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad and id(p) not in owned]
    dense = [DenseSlot(name, len(low_rank) + i, p) for i, (name, p) in enumerate(trainable)]
    for name, parameter in trainable:
        allowed = (torch.float32, torch.bfloat16)
        _require(parameter.dtype in allowed, f"the dtype of {name}", parameter.dtype, "float32 or bfloat16")
    _require(bool(low_rank or dense), "the model's trainable tensor count", 0, "at least 1: nothing would be trained")
    for device in {slot.leaves()[0].device for slot in [*low_rank, *dense]}:
        inner_optimizers.check_ignores_value(factory, device)
        if moments == "rotate" and any(slot.projected for slot in low_rank):
            inner_optimizers.check_rotates(factory, device)
        if inner == "adamw8bit":
            inner_optimizers.check_adamw8bit(factory, options["betas"], options["eps"], device)
    return LowRankOptimizer(
        low_rank,
        dense,
        lr=lr,
        weight_decay=weight_decay,
        scale=scale,
        factory=factory,
        stepping=stepping,
        seed=seed,
    )
