"""The steps of single tensors, which all ways of stepping have in common: prepare, look, apply.

*Prepare* a tensor whose gradient is complete: sum it over the processes and, where a basis is due, find it and project.
*Look* whether it is finite. *Apply* it: one inner step from zero, written back, and the gradient is dropped.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..errors import NumericalError
from ..parallel import ALONE, Team
from ..quant.counter import derive_key
from .layers.experts import Experts
from .rules import observed
from .rules.observed import Observation
from .tensors import owning
from .tensors.base import TrainedTensor

Add = Callable[[list[Tensor]], None]  # replaces tensors by their sums over the processes
NORMS = "the norms of the gradients"  # where processes meet that add them
GROUPS = ("lowrank", "dense", "vector")  # of parameters, in the optimizer's order
JOINED = 1 << 22  # weights that step together at most: a few small matrices, which would leave a GPU idle one by one


class Idle:
    """Which process has a gradient for a tensor that some micro-batches leave out: those of a mixture's experts."""

    def __init__(self, team: Team) -> None:
        self.team = team
        self.sometimes: dict[int, TrainedTensor] = {}  # by the identity of their leaves

    def watch(self, experts: Experts, tensors: Iterable[TrainedTensor]) -> None:
        """In a team: the weights of ``experts``, among ``tensors``, may have a gradient elsewhere but not here."""
        leaves = {id(leaf): tensor for tensor in tensors for leaf in tensor.leaves()}
        own = (id(parameter) for parameter in experts.parameters())
        self.sometimes |= {leaf: leaves[leaf] for leaf in own if leaf in leaves}

    def lowest(self, tensor: TrainedTensor, leaf: nn.Parameter) -> int | None:
        """The lowest process with a gradient in ``leaf``, where the others then have zeros; None if none has one."""
        if id(leaf) not in self.sometimes:
            return 0
        found = self.team.lowest(f"the tokens of {tensor.name}", leaf.grad is not None)
        if found is not None and leaf.grad is None:
            leaf.grad = torch.zeros(leaf.shape, dtype=leaf.grad_dtype, device=leaf.device)
        return found

    def someone_has(self, tensor: TrainedTensor) -> bool:
        """Whether a process has a gradient for ``tensor``; all then have one, if only of zeros."""
        for leaf in tensor.leaves():
            if leaf.requires_grad and id(leaf) in self.sometimes:
                return self.lowest(tensor, leaf) is not None
        return tensor.holds_gradient()


class TensorSteps:
    """Steps tensors when it is told to, and knows which have stepped in the step that is being taken.

    ``events``, ``observations`` and ``grad_norm`` are what ``LowRankOptimizer`` says of them.
    """

    param_groups: list[dict[str, Any]]

    def __init__(self, tensors: list[TrainedTensor], seed: int, team: Team) -> None:
        self.tensors, self.seed, self.team, self.idle = tensors, seed, team, Idle(team)
        self.step_count = 0
        self.events: list[dict[str, Any]] = []
        self.observations: list[Observation | observed.Told] = []
        self.stepped: dict[str, None] = {}  # names, in the step that is being taken and in its order
        self._prepared: set[str] = set()  # those whose gradient is the whole step's, projected
        self._records: dict[str, dict[str, Any] | None] = {}  # of refreshes by owners, and None for those of others
        self._spread: set[str] = set()  # those whose new bases all have
        self._squares: list[Tensor] = []
        self._tensor_of = {id(leaf): tensor for tensor in tensors for leaf in tensor.leaves()}

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
            self.team.meet(f"the gradient of {tensor.name}")
            self.team.begin(tensor.to_sum()).wait()
        self.prepare_summed(tensor)
        return True

    @torch.no_grad()
    def prepare_summed(self, tensor: TrainedTensor) -> None:
        """:meth:`prepare_tensor` for a ``tensor`` whose gradient is the whole team's already, or has gone to its
        owner."""
        self._prepared.add(tensor.name)
        due = tensor.awaits_refresh()
        if due and tensor.owner is not None:
            self._records[tensor.name] = None
        if due and tensor.owner is not None and tensor.adaptive:
            owning.find_rank(tensor, self.team, partial(self.refresh_tensor, tensor))
        elif due and not tensor.elsewhere:
            self.refresh_tensor(tensor)
        if tensor.elsewhere:
            tensor.drop_gradient()

    def waits_for_step(self, tensor: TrainedTensor) -> bool:
        """Whether ``tensor`` has a gradient of this step, here or at its owner."""
        if tensor.owner is None:
            return tensor.gradient() is not None
        return tensor.name in self._prepared and tensor.name not in self.stepped

    @torch.no_grad()
    def apply_tensor(self, tensor: TrainedTensor) -> None:
        """One inner step of a prepared ``tensor``, written back; its gradient is dropped.

        Raises :class:`NumericalError`, with nothing done, if the gradient is not finite.
        """
        self.look_at([tensor])
        self._apply([tensor])

    @torch.no_grad()
    def apply_tensors(self, tensors: list[TrainedTensor]) -> None:
        """:meth:`apply_tensor` for each of ``tensors``, all of which are looked at before the first moves."""
        self.look_at(tensors)
        self.move(tensors)

    @torch.no_grad()
    def move(self, tensors: Iterable[TrainedTensor]) -> None:
        """:meth:`apply_tensors` for ``tensors`` that were looked at. What one process steps for all is handed out."""
        tensors = list(tensors)
        try:
            for some in together(tensor for tensor in tensors if not tensor.elsewhere):
                self._apply(some)
        finally:  # all are sure to come here, and one that has failed is heard of later
            self.stepped |= dict.fromkeys(tensor.name for tensor in tensors)
            self.hand_out(tensors)

    def hand_out(self, tensors: Iterable[TrainedTensor], weights: bool = True) -> None:
        """Let all have what the owners of ``tensors`` have changed: bases that were due, once in a step, and
        ``weights``."""
        owned = [(tensor, tensor.owner) for tensor in tensors if tensor.owner is not None]
        due = {tensor.name for tensor, _ in owned} & self._records.keys() - self._spread
        self.team.hand_out(
            [one for tensor, owner in owned for one in tensor.handed(owner, tensor.name in due, weights)]
        )
        self._spread |= due

    def share_outcomes(self) -> None:
        """Once a step, let all know what owners have found out: when bases are due again, and what is recorded."""
        looked = observed.due(self.step_count) and any(t.keeps_whole and t.owner is not None for t in self.tensors)
        if not self._records and not looked:
            return
        found = {one.name: one.row() for one in self.observations}
        mine = [t for t in self.tensors if t.name in self._records and not t.elsewhere]
        own = {tensor.name: (tensor.outcome(), self._records[tensor.name]) for tensor in mine}
        told = self.team.gather("what the owners of weights have found out", (own, found))
        outcomes = {name: value for part, _ in told for name, value in part.items()}
        rows = {name: row for _, part in told for name, row in part.items()}
        self.observations = [observed.Told(rows[name]) for name in self.stepped if name in rows]
        for tensor in self.tensors:
            if tensor.name in outcomes:
                outcome, record = outcomes[tensor.name]
                tensor.follow(outcome)
                self._records[tensor.name] = record
        self.events += [record for record in self._records.values() if record is not None]
        self._records.clear()

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
        tensor.deciding = self.team.led_by(own_of or 0) if tensor.owner is None else ALONE
        record = tensor.refresh(self.step_count, own_of is not None)
        if tensor.owner is not None:
            self._records[tensor.name] = record
        elif record is not None:
            self.events.append(record)

    def _apply(self, tensors: Sequence[TrainedTensor]) -> None:
        """Step tensors that may step together (:func:`together`). Never sees a gradient that is not finite."""
        group = self.param_groups[GROUPS.index(tensors[0].group)]
        rates = group["lr"], group["scale"], group["lr"] * group["weight_decay"]
        keys = [derive_key(self.seed, self.step_count, tensor.index) for tensor in tensors]
        tensors[0].step_together(tensors, *rates, keys)
        for tensor in tensors:
            self.stepped[tensor.name] = None
            if tensor.owner is not None:
                tensor.finish_record()  # while its block is whole
            if (observation := tensor.observation()) is not None:
                self.observations.append(observation)

    def look_at(self, tensors: list[TrainedTensor], add: Add | None = None) -> None:
        """Raise :class:`NumericalError` if a gradient of ``tensors`` is not finite. ``add``: as for :func:`squares`; by
        default the processes meet before they add."""
        # The first tensor of a step begins the sum of squares of which ``grad_norm`` is the root.
        if tensors and not self.stepped:
            self._squares = []
        found = squares(tensors, add or partial(self.team.sum_, NORMS))
        if not found:
            return
        # One value leaves the device for all, since each that does makes a GPU wait.
        seen = found[0] if len(found) == 1 else torch.stack([square.to(found[0].device) for square in found])
        if not torch.isfinite(seen).all():
            self.complain(next(t for t, square in zip(tensors, found, strict=True) if not torch.isfinite(square)))
        self._squares += found

    def complain(self, tensor: TrainedTensor) -> NoReturn:
        """Raise :class:`NumericalError` for a gradient that is not finite."""
        partial = f"; {len(self.stepped)} of {len(self.tensors)} tensors were already stepped" if self.stepped else ""
        raise NumericalError(
            f"the gradient of {tensor.name} is not finite in optimizer step {self.step_count} (counted from 0){partial}"
        )

    @property
    def grad_norm(self) -> float:
        """L2 norm over all gradients seen since the step began (or of the last step, right after it)."""
        return float(torch.stack(self._squares).sum().sqrt()) if self._squares else 0.0

    @property
    def has_refreshed(self) -> bool:
        """Whether a basis may be new in the step that is being taken."""
        return bool(self.events or self._records)

    @property
    def inside_step(self) -> bool:
        """Whether some tensors have taken a step that is not closed yet."""
        return bool(self.stepped)


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


def squares(tensors: Iterable[TrainedTensor], add: Add) -> list[Tensor]:
    """‖gradient‖² of each, fp32 and 0-dim. ``add`` replaces by their sums over the processes those of tensors that one
    process steps for all, whose gradients no other one has."""
    found, owned = [], []
    for tensor in tensors:
        gradient = None if tensor.elsewhere else tensor.gradient()
        if gradient is not None:
            found.append(torch.linalg.vector_norm(gradient, dtype=torch.float32).square())
        else:  # with its owner, unless that has failed
            assert tensor.owner is not None, f"{tensor.name} has no gradient"
            found.append(torch.zeros((), device=tensor.leaves()[0].device))
        if tensor.owner is not None:
            owned.append(found[-1])
    if owned:
        add(owned)
    return found
