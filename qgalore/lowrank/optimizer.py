"""The optimizer: for every trained tensor an inner step from zero, then a merge into what is stored.

Two ways to step give the same weights. *Deferred*: gradients of Δ are kept until ``step()``, so accumulation and
``clip_grad_norm_`` work. *Fused*: each tensor steps inside backward, as soon as its gradient is complete, and the
gradient is freed at once; ``step()`` then only closes the step.
"""

import math
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import ConfigError, NumericalError
from ..quant.counter import derive_key
from . import inner as inner_optimizers
from . import rule_slot
from .linear import LowRankLinear
from .lora import LoraLinear
from .moments import POLICIES as MOMENTS
from .policies import POLICIES, make_schedules
from .projector import METHODS
from .rules import RuleOptions
from .slots import DenseSlot, LowRankSlot, RefreshOptions, Slot

STEPPING = ("deferred", "fused")
PART_ELEMENTS = 1 << 24  # 64 MiB of fp32 scratch; larger tensors step in parts, which elementwise rules do not notice


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
        part_elements: int,
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
        attach(self.slots, factory, part_elements)
        for slot in self.slots:
            for leaf in slot.leaves():
                leaf.requires_grad_(True)  # a hook needs it; arm() then leaves it on for one leaf of each layer
                leaf.register_post_accumulate_grad_hook(lambda leaf, slot=slot: self._gradient_arrived(slot, leaf))
            slot.arm(0)

    @property
    def grad_norm(self) -> float:
        """L2 norm over all gradients seen since the step began (or of the last step, right after it)."""
        return float(torch.stack(self._squares).sum().sqrt()) if self._squares else 0.0

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Read by ``torch.amp.GradScaler``, which is thereby refused: bases would be sought in scaled gradients, which
        may overflow, and fused stepping would not undo the scale."""
        raise ConfigError("fp16 with a GradScaler is refused; use bfloat16, which needs none (Trainer: bf16=True)")

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
        elif type(slot) is LowRankSlot and slot.schedule.refreshes == 0:
            # Every layer's first basis comes from the first micro-batch, so that their full gradients never coexist.
            self._refresh_if_due(slot)

    def _begin(self) -> None:
        if not self._stepped:
            self._squares = []

    def _refresh_if_due(self, slot: Slot) -> None:
        if not rule_slot.awaits_refresh(slot):
            return
        if not torch.isfinite(torch.linalg.vector_norm(slot.module.probe.grad)):
            self._complain(slot)
        if (record := slot.refresh(self.step_count)) is not None:
            self.events.append(record)

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
        key = derive_key(self.seed, self.step_count, slot.index)
        slot.step(group["lr"], group["scale"], group["lr"] * group["weight_decay"], key)
        self._stepped.add(slot.name)

    @torch.no_grad()
    def refresh(self) -> None:
        """Deferred stepping: find the bases that are due, from the whole step's gradient, and project it.

        ``step()`` does this itself; call it before ``clip_grad_norm_`` so that the norm is that of projected gradients.
        """
        due = [slot for slot in self.slots if rule_slot.awaits_refresh(slot)]
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

    def waiting(self) -> int:
        """How many layers' refreshes were due in an earlier step and still wait for a gradient: a mixture's experts
        that get no tokens."""
        slots = (slot for slot in self.slots if isinstance(slot, LowRankSlot) and slot.projected)
        return sum(slot.schedule.next_refresh < self.step_count for slot in slots)

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


def _refuse_several_processes() -> None:
    """Raise :class:`ConfigError` in a job of several processes: DistributedDataParallel notes which parameters train
    when it is built and would leave out each Δ whose probe is on at that time, so the copies would part silently."""
    group = torch.distributed
    if group.is_available() and group.is_initialized() and group.get_world_size() > 1:
        raise ConfigError(
            f"torch.distributed has {group.get_world_size()} processes; the low-rank optimizer trains in one: start "
            "the program without torchrun or accelerate launch"
        )


def attach(slots: list[Slot], factory: inner_optimizers.Factory, part_elements: int) -> None:
    """Give every slot its leaves and inner optimizers. One scratch buffer for each device, as large as the largest
    leaf: only one leaf is real at a time."""
    sizes: dict[torch.device, int] = {}
    for slot in slots:
        device = slot.leaves()[0].device
        sizes[device] = max(sizes.get(device, 0), slot.largest_part(part_elements))
    scratch = {device: torch.zeros(size, device=device) for device, size in sizes.items()}
    for slot in slots:
        slot.attach(scratch[slot.leaves()[0].device], factory, part_elements)


def part_elements(inner: str | type[Optimizer]) -> int:
    """The size above which a tensor steps in parts: an optimizer that looks at a matrix as one (Adafactor) must see it
    whole."""
    return PART_ELEMENTS if inner in inner_optimizers.BUILTIN else sys.maxsize


def stepped_layers(model: nn.Module) -> dict[str, LowRankLinear]:
    """The layers whose weights are stepped: not those of LoRA, whose factors are ordinary parameters."""
    found = ((name, m) for name, m in model.named_modules() if isinstance(m, LowRankLinear))
    return {name: module for name, module in found if not isinstance(module, LoraLinear)}


def collect_slots(
    model: nn.Module,
    *,
    update_proj_gap: int,
    stagger: bool,
    lazy: dict[str, Any],
    find: RefreshOptions,
    rule: str,
    of_rule: RuleOptions,
) -> tuple[list[LowRankSlot], list[DenseSlot]]:
    """A slot for every trainable tensor of a converted model, low-rank layers first."""
    modules = stepped_layers(model)
    schedules = make_schedules(find.policy, len(modules), update_proj_gap, stagger, lazy)
    low_rank = rule_slot.make(rule, modules, schedules, find, of_rule)
    owned = {id(leaf) for module in modules.values() for leaf in module.leaves().values()}
    trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad and id(p) not in owned]
    for name, parameter in trainable:
        allowed = (torch.float32, torch.bfloat16)
        _require(parameter.dtype in allowed, f"the dtype of {name}", parameter.dtype, "float32 or bfloat16")
    return low_rank, [DenseSlot(name, len(low_rank) + i, p) for i, (name, p) in enumerate(trainable)]


def _slot_state(slot: Slot) -> dict[str, Any]:
    """``inner``: the parts' optimizer states, with the part's number before each name where there are several."""
    inner: dict[str, Any] = {}
    for number, part in enumerate(slot.parts):
        prefix = f"{number}." if len(slot.parts) > 1 else ""
        inner |= {prefix + name: value for name, value in part.state().items()}
    state = {"inner": inner, "extra": slot.tensors()}
    if isinstance(slot, LowRankSlot):
        state["schedule"] = slot.schedule.state()
    return state


def _load_slot_state(slot: Slot, state: dict[str, Any]) -> None:
    for number, part in enumerate(slot.parts):
        prefix = f"{number}." if len(slot.parts) > 1 else ""
        mine = {n.removeprefix(prefix): value for n, value in state["inner"].items() if n.startswith(prefix)}
        part.inner.state.pop(part.leaf, None)
        if mine:
            part.inner.state[part.leaf] = {
                # torch keeps Adam's step count on the CPU on purpose; other tensors belong beside the leaf
                name: value.to(part.leaf.device) if torch.is_tensor(value) and name != "step" else value
                for name, value in mine.items()
            }
    for name, value in slot.tensors().items():
        value.copy_(state["extra"][name])
    if isinstance(slot, LowRankSlot):
        slot.schedule = type(slot.schedule)(**state["schedule"])


def _require(condition: bool, name: str, value: Any, rule: str) -> None:
    if not condition:
        raise ConfigError(f"{name} is {value!r}; it must be {rule}")


def optimizer(
    model: nn.Module,
    *,
    lr: float,
    rule: str = "galore",
    rank: int | None = None,
    weight_decay: float = 0.0,
    scale: float | None = None,
    inner: str | type[Optimizer] = "adamw8bit",
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    inner_options: dict[str, Any] | None = None,
    stepping: str = "deferred",
    full_gradients: str = "free",
    update_proj_gap: int = 200,
    cos_threshold: float = 0.4,
    gamma_proj: float = 2.0,
    queue_size: int = 5,
    max_gap: int | None = None,
    stagger: bool = True,
    projector: str = "randomized",
    policy: str = "overlap",
    similarity: str | None = None,
    moments: str = "rotate",
    seed: int = 0,
) -> LowRankOptimizer:
    """The Q-GaLore optimizer for a model prepared by ``qgalore.convert`` (unconverted tensors train dense).

    Steps of low-rank layers are ``W ← W(1 − lr·weight_decay) + scale · L Δ R̂ᵀ`` with Δ the inner optimizer's step.

    rule: ``galore``, or one that needs the full gradient in every step: ``apollo`` (with ``rank``, of its random
      projection), ``apollo_mini``, ``scale``, ``fira``, ``momentum`` (see ``rules``). ``scale`` None: the rule's own.
    full_gradients: ``keep`` lets such a rule step deferred, which keeps all full gradients at once.
    inner: ``adamw8bit`` (bitsandbytes; our own on a CPU), ``adamw``, or any ``torch.optim.Optimizer`` class or dotted
      path whose step does not depend on the parameter's value (checked); ``betas`` and ``eps`` go to the two named
      ones, others take ``inner_options``.
    stepping: ``deferred`` or ``fused`` (see the module). Fused refuses accumulation and cannot clip the global norm.
    update_proj_gap, cos_threshold, gamma_proj, queue_size, max_gap: the lazy schedule, in optimizer steps; ``max_gap``
      defaults to 16 · update_proj_gap; cos_threshold > 1 never stretches a gap.
    stagger: spread the refreshes after the first over the gap; projector: ``randomized`` | ``exact``;
    policy: when to refresh, ``overlap`` | ``first_vector`` | ``signed_cosine`` | ``energy`` | ``fixed`` (see
      ``policies``; ``similarity`` is its name of old); moments: ``rotate`` | ``keep`` | ``reset``.

    Raises :class:`ConfigError` for bad values, for an optimizer that cannot work on Δ, and if nothing is trainable.
    """
    _refuse_several_processes()
    _require(lr > 0 and math.isfinite(lr), "lr", lr, "a positive number")
    _require(stepping in STEPPING, "stepping", stepping, f"one of {STEPPING}")
    _require(projector in METHODS, "projector", projector, f"one of {METHODS}")
    if similarity is not None:
        print(f"note: similarity={similarity!r} is deprecated; say policy={similarity!r}", flush=True)
        policy = similarity
    _require(policy in POLICIES, "policy", policy, f"one of {POLICIES}")
    _require(moments in MOMENTS, "moments", moments, f"one of {MOMENTS}")
    _require(update_proj_gap >= 1, "update_proj_gap", update_proj_gap, "at least 1")
    _require(queue_size >= 1, "queue_size", queue_size, "at least 1")
    _require(gamma_proj >= 1, "gamma_proj", gamma_proj, "at least 1")
    options = dict(inner_options or {})
    if inner in inner_optimizers.BUILTIN:
        options = {"betas": tuple(betas), "eps": eps, **options}
    factory = inner_optimizers.make_factory(inner, lr, options)
    find = RefreshOptions(method=projector, policy=policy, moments=moments, seed=seed)
    lazy = {"cos_threshold": cos_threshold, "gamma_proj": gamma_proj, "queue_size": queue_size}
    lazy["max_gap"] = max_gap or 16 * update_proj_gap
    modules = stepped_layers(model)
    rule_slot.check(rule, rank, stepping, full_gradients, modules)
    of_rule = RuleOptions(rank, update_proj_gap, seed, "8bit" if inner == "adamw8bit" else "fp32")
    low_rank, dense = collect_slots(
        model, update_proj_gap=update_proj_gap, stagger=stagger, lazy=lazy, find=find, rule=rule, of_rule=of_rule
    )
    _require(bool(low_rank or dense), "the model's trainable tensor count", 0, "at least 1: nothing would be trained")
    for device in {slot.leaves()[0].device for slot in [*low_rank, *dense]}:
        inner_optimizers.check_ignores_value(factory, device)
        if moments == "rotate" and any(rule_slot.turns_moments(slot) for slot in low_rank):
            inner_optimizers.check_rotates(factory, device)
        if inner == "adamw8bit":
            inner_optimizers.check_adamw8bit(factory, options["betas"], options["eps"], device)
    return LowRankOptimizer(
        low_rank,
        dense,
        lr=lr,
        weight_decay=weight_decay,
        scale=rule_slot.default_scale(rule) if scale is None else scale,
        factory=factory,
        stepping=stepping,
        seed=seed,
        part_elements=part_elements(inner),
    )
