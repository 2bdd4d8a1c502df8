"""One slot for each trained tensor: where its gradient arrives, the leaf that steps, where that merges."""

import math
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...parallel import ALONE, Team
from ...quant import dense as dense_grid
from ...quant import dispatch, int8
from ...quant.counter import derive_key
from ..layers.conv import BlockBasis
from ..layers.linear import LowRankLinear
from ..subspace import measures, moments, search, sides
from ..subspace.policies import DECIDING
from ..subspace.schedule import Schedule

COSINES = ("first_vector", "signed_cosine")


@dataclass(frozen=True)
class RefreshOptions:
    """How a basis is found (``projector``), when (``policies``), what the moments do (``moments``), and who must find
    the same one (``team``); and how int8 weights are rounded and scaled at a merge (``quant.int8``)."""

    method: str = "randomized"
    policy: str = "overlap"
    moments: str = "rotate"
    power_iterations: int = 2
    seed: int = 0
    team: Team = ALONE
    rounding: str = "stochastic"
    scales: str = "sticky"
    energy: float = 0.9  # of the gradient, which a rank that is free to move keeps (``ranks``)


class Scratch:
    """fp32 memory that the leaves of all parts on a device share, there only while a step is taken."""

    def __init__(self, elements: int, device: torch.device) -> None:
        self.flat = torch.zeros(elements, device=device)
        self.nbytes = self.flat.untyped_storage().nbytes()

    def hold(self) -> None:
        """Make the memory real, with any content, if it is not."""
        if self.flat.untyped_storage().nbytes() < self.nbytes:
            self.flat.untyped_storage().resize_(self.nbytes)

    def release(self) -> None:
        """Give the memory back; views of it stay valid objects, to be used after the next :meth:`hold`."""
        self.flat.untyped_storage().resize_(0)


@dataclass
class Part:
    """Rows of a slot that step together: ``leaf`` is an fp32 view into ``scratch``, which all parts share, real only
    while ``inner`` steps it from zero; ``first`` is its first row."""

    first: int
    leaf: nn.Parameter
    inner: Optimizer
    scratch: Scratch

    def state(self) -> dict[str, Any]:
        """What the inner optimizer keeps for the leaf; empty before the first step."""
        return dict(self.inner.state.get(self.leaf, {}))

    def step(self, gradient: Tensor, lr: float) -> Tensor:
        """The inner optimizer's step from zero: Δ, fp32, valid until another part steps or the scratch is released."""
        self.scratch.hold()
        self.leaf.data = self.scratch.flat[: self.leaf.numel()].view(self.leaf.shape)  # whose rank may have changed
        with torch.no_grad():
            self.leaf.zero_()
        self.leaf.grad = gradient.to(torch.float32).contiguous()
        for group in self.inner.param_groups:
            group["lr"] = lr
        self.inner.step()
        self.leaf.grad = None
        return self.leaf.detach()


class Slot:
    """State common to both kinds. A tensor steps in ``parts``: whole, or by rows where that saves scratch memory and
    changes nothing. ``index`` numbers the slot's random streams."""

    by_rows = True  # whether row i of Δ moves nothing but row i of what is stored
    shared = False  # whether other processes step other rows of the same tensor
    deciding = ALONE  # the team, led by the rank whose gradient gives a basis

    def __init__(self, name: str, index: int, shape: torch.Size) -> None:
        self.name, self.index, self.shape = name, index, shape
        self.parts: list[Part] = []

    def row_ranges(self, limit: int) -> list[tuple[int, int]]:
        """Row ranges of the parts, of about ``limit`` elements at most, each whole 8-bit blocks but the last."""
        rows, size = self.shape[0] if len(self.shape) else 1, self.shape.numel()
        if size <= limit or not self.by_rows or len(self.shape) < 2:
            return [(0, rows)]
        unit = moments.BLOCK // math.gcd(moments.BLOCK, size // rows)
        step = -(-rows // -(-size // limit) // unit) * unit
        return [(start, min(start + step, rows)) for start in range(0, rows, step)]

    def received(self, leaf: Tensor) -> None:
        """Called when ``leaf`` has its gradient of a micro-batch."""

    def kept(self, name: str, value: Any) -> Any:
        """What a checkpoint is given of ``value``, which the inner optimizer calls ``name``."""
        return value

    def restored(self, name: str, value: Any) -> Any:
        """Inverse of :meth:`kept`."""
        return value

    def largest_part(self, limit: int) -> int:
        """Elements of scratch memory that this slot needs."""
        a, b = self.row_ranges(limit)[0]
        return self.shape.numel() if len(self.shape) < 2 else (b - a) * (self.shape.numel() // self.shape[0])

    def attach(self, scratch: Scratch, factory, limit: int) -> None:
        """Place the leaves in ``scratch`` (held, large enough) and give each its inner optimizer."""
        for a, b in self.row_ranges(limit):
            shape = (b - a, *self.shape[1:]) if len(self.shape) else ()
            leaf = nn.Parameter(scratch.flat[: torch.Size(shape).numel()].view(shape))
            self.parts.append(Part(a, leaf, factory([leaf]), scratch))

    def step(self, lr: float, scale: float, shrink: float, key: tuple[int, int]) -> None:
        """Step every part and merge it: ``W ← W(1 − shrink) + scale · update``, then drop the gradient."""
        gradient = self.gradient()
        for part in self.parts:
            mine = gradient if len(self.parts) == 1 else gradient[part.first : part.first + part.leaf.shape[0]]
            self.merge(part.step(mine, lr), part.first, scale, shrink, key)
        self.drop_gradient()


class DenseSlot(Slot):
    """A tensor trained in full: embeddings, head, norms, biases, and everything under ``method: adamw``.

    fp32 tensors take the update as it is. Large bf16 ones are rounded stochastically; bf16 vectors (norms, biases) keep
    an fp32 master, since a stochastic walk of a few thousand values is worth avoiding for four bytes each.
    """

    def __init__(self, name: str, index: int, parameter: nn.Parameter) -> None:
        super().__init__(name, index, parameter.shape)
        self.parameter = parameter
        needs_master = parameter.dtype != torch.float32 and parameter.ndim < 2
        self.master = parameter.detach().to(torch.float32) if needs_master else None

    def leaves(self) -> list[nn.Parameter]:
        return [self.parameter]

    def arm(self, step: int) -> None:
        """Nothing to choose: the parameter always receives its gradient."""

    def gradient(self) -> Tensor | None:
        return self.parameter.grad

    def drop_gradient(self) -> None:
        self.parameter.grad = None

    @torch.no_grad()
    def merge(self, delta: Tensor, first: int, scale: float, shrink: float, key: tuple[int, int]) -> None:
        """Add ``scale`` (1 for all but low-rank layers) times ``delta`` to the rows from ``first`` on."""
        target = self.parameter.detach() if self.master is None else self.master
        rows = target.view(target.shape[0], -1) if target.ndim > 1 else target.view(1, -1)
        flat = delta.view(-1, rows.shape[1])
        rows = rows[first : first + flat.shape[0]]
        update = flat if scale == 1.0 else flat * scale
        dense_grid.write_back(rows, lambda a, b: update[a:b], shrink=shrink, key=key, first_row=first)
        if self.master is not None:
            self.parameter.copy_(self.master)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold beside the model's own tensors."""
        return {} if self.master is None else {"master": self.master}


class LowRankSlot(Slot):
    """A :class:`LowRankLinear`'s weight, with its refresh schedule."""

    def __init__(
        self, name: str, index: int, module: LowRankLinear, schedule: Schedule, options: RefreshOptions
    ) -> None:
        super().__init__(name, index, module.delta.shape)
        self.module, self.schedule, self.options = module, schedule, options
        self.mine, self.first_row = module, 0  # what of the weight is stepped here
        self.projected = module.left is not None or module.right is not None
        self.by_rows = module.left is None
        self._unfinished: tuple[dict[str, Any], measures.Lines | None] | None = None  # a record that waits for a merge

    def leaves(self) -> list[nn.Parameter]:
        return [self.module.delta, self.module.probe]

    def arm(self, step: int) -> None:
        """Choose which leaf the coming backward passes fill: Δ, or the probe where a refresh is due."""
        self._finish_record()
        due = self.projected and self.schedule.due(step)
        self.module.probe.requires_grad_(due)
        self.module.delta.requires_grad_(not due)
        if due and self.module.products is not None:
            self.module.products.retry()

    def gradient(self) -> Tensor | None:
        return self.module.delta.grad

    def drop_gradient(self) -> None:
        self.module.delta.grad = None
        self.module.probe.grad = None

    @torch.no_grad()
    def refresh(self, step: int) -> dict[str, Any] | None:
        """Turn the probe's full gradient into a new basis and Δ's gradient G P_new; returns the record of the decision,
        None if the schedule has only looked at the gradient and keeps the basis.

        Afterwards Δ receives any further micro-batch of this step. If no basis can be found the old one stays. In a
        team one rank decides: the first basis comes from its own gradient, the others from one that all hold in sum.
        """
        started = time.perf_counter()
        gradient, self.module.probe.grad = self.module.probe.grad, None
        first = self.schedule.refreshes == 0
        waited = step - self.schedule.next_refresh  # for a gradient, as an expert without tokens does
        team = self.deciding
        if not team.of_first(f"the refresh of {self.name}", lambda: bool(gradient.any())):
            return self._postpone(step, first)
        generator = torch.Generator(gradient.device)
        generator.manual_seed(derive_key(self.options.seed, step, self.index)[0] & 0x7FFFFFFF)
        stored = self.module.columns()
        energy = partial(team.of_first, f"a look at {self.name}", lambda: self._energy(gradient, stored))
        if not self.schedule.wants(step, energy):
            self._receive(gradient, first)
            return None
        old = [None if first or columns is None else search.orthonormal(columns) for columns in stored]
        found, failure = self._find(gradient, old, generator)
        failure = team.of_first(f"a basis of {self.name}", lambda: failure)
        team.receive_(f"the basis of {self.name}", [columns for columns in found if columns is not None])
        row = self._record(step, first, failure) | measures.moments(part.state() for part in self.parts)
        if failure is None or first:
            row |= team.of_first(f"the subspaces of {self.name}", lambda: self._compare(gradient, old, found))
            self._adopt(found, stored, first)
            self.schedule.record(step, row["similarity"])
        else:
            row["similarity"] = None
            self.schedule.record_failure(step)
        self._receive(gradient, first)
        row |= {"gap": self.schedule.gap, "next_refresh": self.schedule.next_refresh}
        self._unfinished = row, measures.lines_before(self.mine, step)
        row |= {"waited": waited, "refreshes": self.schedule.refreshes, "seconds": time.perf_counter() - started}
        return row

    def _receive(self, gradient: Tensor, first: bool) -> None:
        """Give Δ the projection of a full gradient (the ``first`` is this process's own), and micro-batches to come."""
        self.module.probe.requires_grad_(False)
        self.module.delta.requires_grad_(True)
        self.take(sides.project(gradient, *self.module.columns(), self.module.delta.dtype), first)

    def take(self, gradient: Tensor, first: bool) -> None:
        """Keep a gradient of Δ that a refresh has made."""
        self.module.delta.grad = gradient

    def _energy(self, gradient: Tensor, stored: tuple[Tensor | None, Tensor | None]) -> float:
        """The share of the gradient that the stored bases capture, the mean of the sides. Their rounding, the same at
        every look, is not taken out."""
        pairs = zip(stored, (gradient.T, gradient), strict=True)
        found = [search.captured_energy(matrix, basis) for basis, matrix in pairs if basis is not None]
        return sum(found) / len(found)

    def _record(self, step: int, first: bool, failure: str | None) -> dict[str, Any]:
        row: dict[str, Any] = {"version": measures.VERSION, "step": step, "layer": self.name, "first": first}
        return row | {"failed": failure, "shape": list(self.module.weight.shape), "rank": self.module.rank}

    def _finish_record(self) -> None:
        """Add to the record of this step's refresh what the merge after it did to the weight."""
        if self._unfinished is not None:
            started = time.perf_counter()
            (row, before), self._unfinished = self._unfinished, None
            row |= measures.int8_change(self.mine, before)
            row["seconds"] += time.perf_counter() - started

    def _postpone(self, step: int, first: bool) -> dict[str, Any]:
        """A zero gradient (behind a zero-initialised layer, say) has no subspace: look again in the next step."""
        self.schedule.next_refresh = step + 1
        self.module.probe.requires_grad_(False)
        self.module.delta.requires_grad_(True)
        self.take(torch.zeros_like(self.module.delta, memory_format=torch.contiguous_format), first)
        row = self._record(step, first, "the gradient is zero")
        row |= {"similarity": None, "gap": self.schedule.gap, "next_refresh": self.schedule.next_refresh}
        return row | {"refreshes": self.schedule.refreshes, "seconds": 0.0}

    def rank_to_find(self) -> int:
        """The rank of the bases that a refresh finds."""
        return self.module.rank

    def _find(self, gradient: Tensor, old, generator: torch.Generator) -> tuple[list[Tensor | None], str | None]:
        """New fp32 columns for each side, and None or why the decomposition failed (random columns then)."""
        found: list[Tensor | None] = []
        failure, rank = None, self.rank_to_find()
        for position, (basis, matrix) in enumerate(((self.module.left, gradient.T), (self.module.right, gradient))):
            if basis is None:
                found.append(None)
                continue
            warm = old[position]
            if isinstance(basis, BlockBasis):
                matrix, warm = basis.unfold(matrix), None if warm is None else basis.reduce(warm)
            try:
                if self.options.method == "exact":
                    columns = search.exact_basis(matrix, rank)
                else:
                    columns = search.randomized_basis(matrix, rank, generator, warm, self.options.power_iterations)
                if not torch.isfinite(columns).all():
                    raise torch.linalg.LinAlgError("the decomposition returned values that are not finite")
            except torch.linalg.LinAlgError as error:
                failure = str(error).splitlines()[0]
                columns = search.random_basis(basis.dim, rank, generator, gradient.device)
            found.append(basis.expand(columns) if isinstance(basis, BlockBasis) else columns.contiguous())
        return found, failure

    def _compare(self, gradient: Tensor, old, found) -> dict[str, Any]:
        """Energies and similarities, averaged over the sides that have a basis."""
        rows = []
        for position, matrix in ((0, gradient.T), (1, gradient)):
            new = found[position]
            if new is None:
                continue
            row = dict.fromkeys(("energy_before", "overlap", "overlap_above_chance", *COSINES, "angle_cosines"))
            row["energy"], row["spectrum"] = measures.captured(matrix, new)
            if old[position] is not None:
                row["energy_before"] = search.captured_energy(matrix, old[position])
                row["overlap"] = search.overlap(old[position], new)
                rank = max(new.shape[1], old[position].shape[1])
                row["overlap_above_chance"] = search.above_chance(row["overlap"], rank, new.shape[0])
                row["signed_cosine"] = search.first_vector_cosine(old[position], new)
                row["first_vector"] = abs(row["signed_cosine"])
                row["angle_cosines"] = measures.angle_cosines(old[position], new)
            rows.append(row)
        mean = measures.mean_of_sides(rows)
        return mean | {"similarity": mean[DECIDING[self.options.policy]]}

    def _adopt(self, found, old, first: bool) -> None:
        """Store the new bases and bring the moments along, in the coordinates of what was stored."""
        for basis, columns in zip((self.module.left, self.module.right), found, strict=True):
            if basis is not None:
                basis.assign(columns)
        if first or self.options.moments == "keep":
            return
        if self.options.moments == "reset":
            for part in self.parts:
                moments.reset(part.inner, part.leaf)
            return
        new = self.module.columns()
        changes = [moments.change_of_basis(a, b) for a, b in zip(old, new, strict=True)]
        for part in self.parts:
            moments.rotate(part.inner, part.leaf, *changes)

    @torch.no_grad()
    def merge(self, delta: Tensor, first: int, scale: float, shrink: float, key: tuple[int, int]) -> None:
        """Add ``scale · L Δ R̂ᵀ`` to the weight's rows from ``first`` on (all of them where L is not the identity)."""
        module, mine = self.module, self.mine
        part = slice(first, None if not self.by_rows else first + delta.shape[0])
        weight = mine.weight.detach()[part]
        stored = (weight,) if mine.weight_scale is None else (weight, mine.weight_scale[part])
        where = {"shrink": shrink, "key": key, "first_row": self.first_row + first}
        if len(stored) == 2:
            where |= {"rounding": self.options.rounding, "scales": self.options.scales}
        bases = [None if side is None else side.stored() for side in (module.left, module.right)]
        if len(stored) == 2 and dispatch.fused_merge(*stored, delta, *bases, s=scale, **where):
            return
        write_back = dense_grid.write_back if len(stored) == 1 else int8.write_back
        write_back(*stored, sides.update_rows(delta, *module.columns(), scale), **where)

    def tensors(self) -> dict[str, Tensor]:
        """Bases and weights are the model's own tensors."""
        return {}

    def progress(self) -> dict[str, Any]:
        """What a checkpoint must hold beside tensors."""
        products = self.module.products
        return {"schedule": self.schedule.state()} | ({} if products is None else {"products": products.state()})

    def restore(self, progress: dict[str, Any]) -> None:
        """The inverse of :meth:`progress`, called before the moments are loaded."""
        self.schedule = type(self.schedule)(**progress["schedule"])
        if self.module.products is not None:
            self.module.products.load(progress["products"])
