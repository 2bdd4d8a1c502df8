"""The optimizer: for every trained tensor an inner step from zero, then a merge into what is stored.

Two ways to step give the same weights. *Deferred*: gradients of Δ are kept until ``step()``, so accumulation and
``clip_grad_norm_`` work. *Fused*: each tensor steps inside backward, as soon as its gradient is complete, and the
gradient is freed at once; ``step()`` then only closes the step.

In a team of processes a gradient is summed over them before anything looks at it: when it arrives (fused), or all in
``refresh()`` (deferred). Only the very first bases are found in rank 0's share of it, its first micro-batch; those of a
mixture's expert in the first micro-batch that has tokens for it.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import ConfigError, NumericalError
from ..parallel import ALONE, Team
from ..quant.counter import derive_key
from .inner import checked as inner_optimizers
from .layers.experts import Experts
from .subspace import ranks
from .tensors import whole
from .tensors.projected import DenseSlot, LowRankSlot, Scratch, Slot


class LowRankOptimizer(Optimizer):
    """Steps every trainable tensor of a converted model. Build it with :func:`factory.optimizer`, which documents them.

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
        team: Team = ALONE,
    ) -> None:
        self.team, self._summed = team, False
        self._sometimes: dict[int, Slot] = {}  # by the identity of their leaves: of a mixture's experts
        self.slots: list[Slot] = [*low_rank, *dense]
        self.stepping, self.seed = stepping, seed
        self.step_count = 0
        self.events: list[dict[str, Any]] = []
        self._stepped: set[str] = set()
        self._arrived: dict[str, None] = {}  # in the order of the backward pass, in which fused stepping refreshes
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
        self._scratches = attach(self.slots, factory, part_elements)
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
        """Autograd hook: ``leaf.grad`` now holds a micro-batch's contribution, or an expert's has none."""
        if self.stepping == "fused":
            if slot.name in self._stepped:
                raise RuntimeError(
                    f"{slot.name} received a second gradient before step(): fused stepping takes one backward pass a "
                    "step. For gradient accumulation build the optimizer with stepping='deferred'."
                )
            source = self._source(slot, leaf)
            if source is None:
                return
            self._begin()
            if first := self._is_first(slot):
                self._refresh_if_due(slot, source)
            arrived = slot.gradient() if first else leaf.grad
            self.team.sum_(f"the gradient of {slot.name}", [arrived])
            self._refresh_if_due(slot)
            self._check_finite([slot])
            self._apply(slot)
            return
        self._arrived[slot.name] = None
        first = self._is_first(slot)
        source = self._source(slot, leaf) if first or slot.shared else 0
        if source is None:
            return
        slot.received(leaf)
        if first:
            # Every layer's first basis comes from the first micro-batch, so that their full gradients never coexist.
            self._refresh_if_due(slot, source)

    def watch(self, experts: Iterable[Experts]) -> None:
        """In a team: hear of experts without tokens here, whose gradients others may have."""
        leaves = {id(leaf): slot for slot in self.slots for leaf in slot.leaves()}
        for module in experts:
            own = (id(parameter) for parameter in module.parameters())
            self._sometimes |= {leaf: leaves[leaf] for leaf in own if leaf in leaves}
            module.tell_idle = self._nothing_came

    def _nothing_came(self, layers: Iterable[nn.Module]) -> None:
        """No token of a micro-batch has come to ``layers``: all meet here, as others may have some."""
        inside = [p for layer in layers for p in reversed(list(layer.parameters()))]  # in the order of a backward pass
        for leaf in [p for p in inside if p.requires_grad]:  # which a refresh changes
            if id(leaf) in self._sometimes:
                self._gradient_arrived(self._sometimes[id(leaf)], leaf)

    def _source(self, slot: Slot, leaf: Tensor) -> int | None:
        """The lowest rank with a gradient in ``leaf``, where the others then have zeros; None if none has one."""
        if id(leaf) not in self._sometimes:
            return 0
        source = self.team.lowest(f"the tokens of {slot.name}", leaf.grad is not None)
        if source is not None and leaf.grad is None:
            leaf.grad = torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device)
        return source

    def _is_first(self, slot: Slot) -> bool:
        """Whether ``slot`` looks for its first basis."""
        galore = isinstance(slot, LowRankSlot) and not isinstance(slot, whole.RuleSlot)
        return galore and slot.projected and slot.schedule.refreshes == 0

    def _sum_over_team(self) -> None:
        """Deferred stepping: once a step, sum the gradients of all processes. One without a share has zeros."""
        if self.team.size == 1 or self._summed:
            return
        leaves = [leaf for slot in self.slots for leaf in slot.leaves()]
        held = self.team.any("which tensors have gradients", [leaf.grad is not None for leaf in leaves])
        leaves = [leaf for leaf, has in zip(leaves, held, strict=True) if has]
        for leaf in leaves:
            if leaf.grad is None:
                leaf.grad = torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device)
        self.team.sum_("the gradients of a step", [leaf.grad for leaf in leaves])
        self._summed = True

    def _begin(self) -> None:
        if not self._stepped:
            self._squares = []

    def _refresh_if_due(self, slot: Slot, source: int = 0) -> None:
        if not whole.awaits_refresh(slot):
            return
        if not torch.isfinite(torch.linalg.vector_norm(slot.module.probe.grad)):
            self._complain(slot)
        slot.deciding = self.team.led_by(source)
        if (record := slot.refresh(self.step_count)) is not None:
            self.events.append(record)

    def _complain(self, slot: Slot) -> None:
        partial = f"; {len(self._stepped)} of {len(self.slots)} tensors were already stepped" if self._stepped else ""
        raise NumericalError(
            f"the gradient of {slot.name} is not finite in optimizer step {self.step_count} (counted from 0){partial}"
        )

    def _check_finite(self, slots: list[Slot]) -> None:
        for slot, square in zip(slots, self._square_norms(slots), strict=True):
            if not torch.isfinite(square):
                self._complain(slot)
            self._squares.append(square)

    def _square_norms(self, slots: list[Slot]) -> list[Tensor]:
        """‖gradient‖² of each slot, fp32; those of shared ones summed over the processes that hold rows."""
        squares = [torch.linalg.vector_norm(slot.gradient(), dtype=torch.float32).square() for slot in slots]
        if shares := [square for slot, square in zip(slots, squares, strict=True) if slot.shared]:
            self.team.sum_("the norms of the gradients", shares)
        return squares

    @torch.no_grad()
    def clip(self, parameters: Iterable[Tensor], limit: float) -> float:
        """``clip_grad_norm_`` over ``parameters`` and over the rows that other processes hold; the norm before it."""
        shares = [slot for slot in self.slots if slot.shared and slot.gradient() is not None]
        if not shares:
            return float(torch.nn.utils.clip_grad_norm_(parameters, limit))
        here = [parameter for parameter in parameters if parameter.grad is not None]
        squares = [torch.nn.utils.get_total_norm([p.grad for p in here]).square(), *self._square_norms(shares)]
        norm = torch.stack([square.to(torch.float32) for square in squares]).sum().sqrt()
        torch.nn.utils.clip_grads_with_norm_(here, limit, norm)
        for slot in shares:
            slot.gradient().mul_((limit / (norm + 1e-6)).clamp(max=1.0))
        return float(norm)

    def _apply(self, slot: Slot) -> None:
        """One inner step and its merge. Never sees a gradient that is not finite."""
        group = self.param_groups[self._group_of[slot.name]]
        key = derive_key(self.seed, self.step_count, slot.index)
        slot.step(group["lr"], group["scale"], group["lr"] * group["weight_decay"], key)
        self._stepped.add(slot.name)

    @torch.no_grad()
    def refresh(self) -> None:
        """Deferred stepping: find the bases that are due, from the whole step's gradient, and project it. All
        gradients of a team are summed first.

        ``step()`` does this itself; call it before ``clip_grad_norm_`` so that the norm is that of projected gradients.
        """
        self._sum_over_team()
        due = [slot for slot in self.slots if whole.awaits_refresh(slot)]
        if due:  # look at every gradient before a basis changes: a step that fails must leave no trace
            for slot in self.slots:
                for gradient in (*(leaf.grad for leaf in slot.leaves()), slot.gradient()):
                    if gradient is not None and not torch.isfinite(torch.linalg.vector_norm(gradient)):
                        self._complain(slot)
        order = {name: place for place, name in enumerate(self._arrived)}
        for slot in sorted(due, key=lambda slot: order.get(slot.name, len(order))):
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
        self._check_finite(pending)
        for slot in pending:
            self._apply(slot)
        self.untouched = [slot.name for slot in self.slots if slot.name not in self._stepped]
        self._close()
        return loss

    def skip(self) -> None:
        """Close the step without an update, dropping its gradients (see ``inside_step`` for what it cannot undo)."""
        self.zero_grad()
        self._close()

    def _close(self) -> None:
        for scratch in self._scratches:
            scratch.release()
        self._stepped.clear()
        self._summed = False
        self._arrived.clear()
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


def attach(slots: list[Slot], factory: inner_optimizers.Factory, part_elements: int) -> list[Scratch]:
    """Give every slot its leaves and inner optimizers. One scratch memory for each device, as large as the largest
    leaf: only one leaf is real at a time. Returned unheld, and to be released after each step."""
    sizes: dict[torch.device, int] = {}
    for slot in slots:
        device = slot.leaves()[0].device
        sizes[device] = max(sizes.get(device, 0), slot.largest_part(part_elements))
    scratches = {device: Scratch(size, device) for device, size in sizes.items()}
    for slot in slots:
        slot.attach(scratches[slot.leaves()[0].device], factory, part_elements)
    ranks.share([slot for slot in slots if isinstance(slot, ranks.AutoRankSlot)], factory)
    for scratch in scratches.values():
        scratch.release()
    return list(scratches.values())


def _slot_state(slot: Slot) -> dict[str, Any]:
    """``inner``: the parts' optimizer states, with the part's number before each name where there are several."""
    inner: dict[str, Any] = {}
    for number, part in enumerate(slot.parts):
        prefix = f"{number}." if len(slot.parts) > 1 else ""
        inner |= {prefix + name: slot.kept(name, value) for name, value in part.state().items()}
    state = {"inner": inner, "extra": slot.tensors()}
    return state | (slot.progress() if isinstance(slot, LowRankSlot) else {})


def _load_slot_state(slot: Slot, state: dict[str, Any]) -> None:
    if isinstance(slot, LowRankSlot):
        slot.restore(state)
    for number, part in enumerate(slot.parts):
        prefix = f"{number}." if len(slot.parts) > 1 else ""
        mine = {n.removeprefix(prefix): value for n, value in state["inner"].items() if n.startswith(prefix)}
        mine = {name: slot.restored(name, value) for name, value in mine.items()}
        part.inner.state.pop(part.leaf, None)
        if mine:
            part.inner.state[part.leaf] = {
                # torch keeps Adam's step count on the CPU on purpose; other tensors belong beside the leaf
                name: value.to(part.leaf.device) if torch.is_tensor(value) and name != "step" else value
                for name, value in mine.items()
            }
    for name, value in slot.tensors().items():
        value.copy_(state["extra"][name])
