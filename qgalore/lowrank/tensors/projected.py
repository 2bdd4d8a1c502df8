"""GaLore's trained tensor: a stored weight whose Δ receives the projected gradient, and whose bases are refreshed."""

import time
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...parallel import shards
from ...parallel.handing import Handed
from ...quant import dispatch
from ...quant.counter import derive_key
from ..layers.linear import LowRankLinear
from ..subspace import measures, refresh, sides
from ..subspace.refresh import Found, RefreshOptions, Sides
from ..subspace.schedule import Schedule
from .base import TrainedTensor
from .places import places


class ProjectedTensor(TrainedTensor):
    """A :class:`LowRankLinear`'s weight, with its refresh schedule.

    Δ is the leaf of an ordinary step, and its gradient is the projected one. The probe is the leaf of a step in which a
    refresh is due, and receives the whole gradient.
    """

    module: LowRankLinear

    def __init__(
        self, name: str, index: int, module: LowRankLinear, schedule: Schedule, options: RefreshOptions
    ) -> None:
        super().__init__(name, index, module.delta.shape)
        self.module, self.schedule, self.options = module, schedule, options
        sides_here = [side for side in (module.left, module.right) if side is not None]
        self._weights = places(module, "weight", "weight_scale")
        self._bases = [place for side in sides_here for place in places(side, "codes", "scale")]
        self.shards = shards.shards_of(module.weight)
        self.projected = module.left is not None or module.right is not None
        self.by_rows = module.left is None
        # A refresh's record, which waits for the merge that follows to tell what became of the weight.
        self._unfinished: tuple[dict[str, Any], measures.Lines | None] | None = None

    @property
    def group(self) -> str:
        return "lowrank"

    @property
    def stored(self) -> Tensor:
        return self.module.weight

    @property
    def bases(self) -> tuple:
        """The left and the right basis; None for the identity."""
        return self.module.left, self.module.right

    def leaves(self) -> list[nn.Parameter]:
        return [self.module.delta, self.module.probe]

    def arm(self, step: int) -> None:
        """Δ, or the probe where a refresh is due. Products of integers are tried again where one is."""
        self.end_record()
        if self.frozen():
            return
        due = self.projected and self.schedule.due(step)
        self.listen(due)
        if due and self.module.products is not None:
            self.module.products.retry()

    def frozen(self) -> bool:
        """Whether the user has switched this layer off since the last step; one leaf always listens otherwise."""
        return not any(leaf.requires_grad for leaf in self.leaves())

    def freed(self) -> bool:
        return self.module.delta.requires_grad and self.module.probe.requires_grad

    def listen(self, whole: bool) -> None:
        """Let autograd fill the probe, if the ``whole`` gradient is wanted, or Δ."""
        self.module.probe.requires_grad_(whole)
        self.module.delta.requires_grad_(not whole)

    def gradient(self) -> Tensor | None:
        return self.module.delta.grad

    def drop_gradient(self) -> None:
        self.module.delta.grad = None
        self.module.probe.grad = None

    def is_whole(self, leaf: nn.Parameter) -> bool:
        return leaf is self.module.probe

    def sent_in(self, gradient: Tensor) -> torch.dtype:
        """That of Δ: micro-batches add up in fp32 in any case, and their sum may travel in less."""
        return self.module.delta.dtype

    def awaits_refresh(self) -> bool:
        return self.module.probe.grad is not None

    def seeks_first_basis(self) -> bool:
        return self.projected and self.schedule.refreshes == 0

    def refresh_counts(self, steps: int) -> tuple[int, int]:
        return (self.schedule.refreshes, self.schedule.fixed_refreshes(steps)) if self.projected else (0, 0)

    def waits(self, step: int) -> bool:
        return self.projected and self.schedule.next_refresh < step

    def turns_moments(self) -> bool:
        return self.projected

    @torch.no_grad()
    def refresh(self, step: int, own: bool = False) -> dict[str, Any] | None:
        """Turn the probe's whole gradient into a new basis and Δ's gradient G P_new; returns the record of the
        decision, None if the schedule has only looked at the gradient and keeps the basis.

        Afterwards Δ receives any further micro-batch of this step. If no basis can be found the old one stays. In a
        team one process decides, and the others adopt what it has found.
        """
        started, team = time.perf_counter(), self.deciding
        gradient, self.module.probe.grad = self.module.probe.grad, None
        assert gradient is not None, f"{self.name} is refreshed without a whole gradient"
        first = self.schedule.refreshes == 0
        # An expert without tokens waits for a gradient beyond the step in which its refresh is due.
        waited = step - self.schedule.next_refresh

        if not team.of_first(f"the refresh of {self.name}", lambda: bool(gradient.any())):
            return self._postpone(gradient, step, own)

        # A schedule may decide by a cheap look at the gradient that the present basis is good enough.
        stored = self.module.columns()
        energy = partial(team.of_first, f"a look at {self.name}", lambda: refresh.energy(gradient, stored))
        if not self.schedule.wants(step, energy):
            self.receive(gradient, own)
            return None

        # Search. Only the process that decides has the gradient of all, so the others receive its columns.
        old = (None, None) if first else refresh.orthonormal(stored)
        found = self._find(gradient, old, step)
        failure = team.of_first(f"a basis of {self.name}", lambda: found.failure)
        team.receive_(f"the basis of {self.name}", [columns for columns in found.columns if columns is not None])

        # Compare and adopt. A failed search keeps the old basis, unless there is none: then random columns serve.
        row = self._record(step, first, failure) | measures.moments(part.state() for part in self.parts)
        if failure is None or first:
            policy = self.options.policy
            place = f"the subspaces of {self.name}"
            row |= team.of_first(place, lambda: refresh.compare(gradient, stored, old, found.columns, policy))
            self.adopt(found, stored, first)
            self.schedule.record(step, row["similarity"])
        else:
            row["similarity"] = None
            self.schedule.record_failure(step)

        # The gradient of this step is projected with the basis as it is stored, rounding included.
        self.receive(gradient, own)
        row |= {"rank": self.module.rank, "gap": self.schedule.gap, "next_refresh": self.schedule.next_refresh}
        self._unfinished = row, measures.lines_before(self.module, step)
        row |= {"waited": waited, "refreshes": self.schedule.refreshes, "seconds": time.perf_counter() - started}
        return row

    def _find(self, gradient: Tensor, old: Sides, step: int) -> Found:
        # A seed of its own for each layer and step, so that a resumed run draws the same numbers.
        generator = torch.Generator(gradient.device)
        generator.manual_seed(derive_key(self.options.seed, step, self.index)[0] & 0x7FFFFFFF)
        found = refresh.find(gradient, self.bases, old, self.rank_to_find(), self.options, generator)
        return self.settle_rank(gradient, found, old)

    @property
    def rank(self) -> int:
        """The rank of the bases, for a tensor that has some."""
        rank = self.module.rank
        assert rank is not None, f"{self.name} has no bases"
        return rank

    def rank_to_find(self) -> int:
        """The rank of the bases that a refresh looks for."""
        return self.rank

    def settle_rank(self, gradient: Tensor, found: Found, old: Sides) -> Found:
        """What is kept of the columns that were found; here all."""
        return found

    def adopt(self, found: Found, stored: Sides, first: bool) -> None:
        """Store the new bases and bring the moments along, in the coordinates of what was ``stored``."""
        refresh.adopt(self.bases, found.columns)
        if not first:
            pairs = [(part.inner, part.leaf) for part in self.parts]
            refresh.bring_moments(pairs, stored, self.module.columns(), self.options.moments)

    def receive(self, gradient: Tensor, own: bool) -> None:
        """Give Δ the projection of a whole gradient (this process's ``own``, or a sum), and micro-batches to come."""
        self.listen(False)
        self.take(sides.project(gradient, *self.module.columns(), self.module.delta.dtype), own)

    def take(self, gradient: Tensor, own: bool) -> None:
        """Keep a gradient of Δ that a refresh has made."""
        self.module.delta.grad = gradient

    def receive_nothing(self, gradient: Tensor, own: bool) -> None:
        """As :meth:`receive`, for a whole ``gradient`` of zeros."""
        self.listen(False)
        self.take(torch.zeros_like(self.module.delta, memory_format=torch.contiguous_format), own)

    def _postpone(self, gradient: Tensor, step: int, own: bool) -> dict[str, Any]:
        """A zero gradient (behind a zero-initialised layer, say) has no subspace: look again in the next step."""
        first = self.schedule.refreshes == 0
        self.schedule.next_refresh = step + 1
        self.receive_nothing(gradient, own)
        row = self._record(step, first, "the gradient is zero")
        row |= {"similarity": None, "gap": self.schedule.gap, "next_refresh": self.schedule.next_refresh}
        return row | {"refreshes": self.schedule.refreshes, "seconds": 0.0}

    def _record(self, step: int, first: bool, failure: str | None) -> dict[str, Any]:
        row: dict[str, Any] = {"version": measures.VERSION, "step": step, "layer": self.name, "first": first}
        return row | {"failed": failure, "shape": list(self.module.weight.shape), "rank": self.module.rank}

    def finish_record(self) -> None:
        """Add to the record of this step's refresh what the merge after it did to the weight."""
        if self._unfinished is not None:
            started = time.perf_counter()
            (row, before), self._unfinished = self._unfinished, None
            row |= measures.int8_change(self.module, before)
            row["seconds"] += time.perf_counter() - started

    def end_record(self) -> None:
        """Between two steps. What one process steps for all was looked at while it was whole, or its step never came:
        then nobody else would come to look, and this process would wait for the rows of the others."""
        if self.owner is not None:
            self._unfinished = None
        self.finish_record()

    def handed(self, owner: int, bases: bool, weights: bool = True) -> list[Handed]:
        return [place.handed(owner) for place in (*self._bases * bases, *self._weights * weights)]

    def outcome(self) -> dict[str, Any]:
        return {"schedule": self.schedule.state()}

    def follow(self, outcome: dict[str, Any]) -> None:
        self.schedule = type(self.schedule)(**outcome["schedule"])

    @torch.no_grad()
    def merge(self, delta: Tensor, first: int, scale: float, shrink: float, key: tuple[int, int]) -> None:
        """Add ``scale · L Δ R̂ᵀ`` to the weight's rows from ``first`` on (all of them where L is not the identity)."""
        module, options = self.module, self.options
        # A left basis mixes all rows of Δ into every row of the weight, which is then written whole.
        part = slice(first, None if not self.by_rows else first + delta.shape[0])
        scales = None if module.weight_scale is None else module.weight_scale[part]
        dispatch.merge(
            module.weight.detach()[part],
            scales,
            delta,
            module.left,
            module.right,
            s=scale,
            shrink=shrink,
            key=key,
            first_row=first,
            rounding=options.rounding,
            scales=options.scales,
        )

    def progress(self) -> dict[str, Any]:
        """Bases and weights are the model's own tensors; what remains is when to look again."""
        products = self.module.products
        return {"schedule": self.schedule.state()} | ({} if products is None else {"products": products.state()})

    def restore(self, progress: dict[str, Any]) -> None:
        self.schedule = type(self.schedule)(**progress["schedule"])
        if self.module.products is not None:
            self.module.products.load(progress["products"])

    def traffic(self, gap: int) -> dict[str, float]:
        delta, probe = self.module.delta, self.module.probe
        whole = probe.numel() * probe.dtype.itemsize / gap if self.projected else 0.0
        gradients = {
            "all-reduce Δ gradients": float(delta.numel() * delta.dtype.itemsize),
            "all-reduce full gradients of refreshes": whole,
        }
        return self.sent(gradients, gap)

    def sent(self, gradients: dict[str, float], gap: int) -> dict[str, float]:
        """Bytes of an ordinary step, of which ``gradients`` are those of the gradients in a team without owners."""
        bases = sum(4.0 * basis.dim * basis.rank for basis in self.bases if basis is not None and self.projected)
        if self.owner is None:
            return gradients | {"broadcast bases": bases / gap}
        weights, bases = (float(sum(place.nbytes for place in some)) for some in (self._weights, self._bases))
        to_owners = {name.replace("all-reduce", "reduce"): size for name, size in gradients.items()}
        if self.shards == 1:
            return to_owners | {"broadcast matrices": weights + bases / gap}
        split, handed = weights + bases, {"hand out rows": weights + bases / gap}
        if self.adaptive:  # whose bases are whole everywhere
            split, handed = weights, {"hand out rows": weights, "broadcast bases": bases / gap}
        return {"gather blocks": 2.0 * split} | to_owners | handed
