"""What a trained tensor must do.

The optimizer is a loop over trained tensors, and all that differs between them is a method here. In the order of a
step: ``arm`` chooses the leaf that the coming backward passes fill. ``refresh`` turns a whole gradient into a new basis
where one is due. ``step`` lets the inner optimizer move Δ from zero and calls ``merge``, which writes the update back.
``drop_gradient`` frees what is no longer needed.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...parallel import ALONE
from ...parallel.handing import Handed
from ...parallel.pending import Sum
from ..inner.checked import Factory
from ..rules.observed import Observation

SHARED_STATE = "qmap"  # what bitsandbytes keeps once for all tensors
STEPS_ON = "steps_on"  # an attribute of a leaf that waits in host memory for its turn: the device where it steps


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
    """Rows of a tensor that step together: ``leaf`` is an fp32 view into ``scratch``, which all parts share, real only
    while ``inner`` steps it from zero; ``first`` is its first row. ``rests_on``: where the state is between two steps,
    if not beside the leaf."""

    first: int
    leaf: nn.Parameter
    inner: Optimizer
    scratch: Scratch
    rests_on: torch.device | None = None

    def state(self) -> dict[str, Any]:
        """What the inner optimizer keeps for the leaf; empty before the first step."""
        return dict(self.inner.state.get(self.leaf, {}))

    def set_state(self, state: dict[str, Any]) -> None:
        """Give the inner optimizer what :meth:`state` told of another leaf of this shape; nothing, if it is empty."""
        self.inner.state.pop(self.leaf, None)
        if state:
            self.inner.state[self.leaf] = {name: self._at_home(name, value) for name, value in state.items()}

    def _at_home(self, name: str, value: Any) -> Any:
        """``value`` of the inner optimizer's state where it is between two steps."""
        # torch keeps Adam's step count on the CPU on purpose. Other tensors belong beside the leaf.
        if not torch.is_tensor(value) or name == "step":
            return value
        # What is shared does not travel: it waits where the step is taken.
        travels = not name.startswith(SHARED_STATE)
        return value.to(self.rests_on if travels and self.rests_on is not None else self.leaf.device)

    def step(self, gradient: Tensor, lr: float) -> Tensor:
        """The inner optimizer's step from zero: Δ, fp32, valid until another part steps or the scratch is released."""
        self.scratch.hold()
        # The view is made anew, since a refresh may have changed the rank.
        self.leaf.data = self.scratch.flat[: self.leaf.numel()].view(self.leaf.shape)
        with torch.no_grad():
            self.leaf.zero_()
        self.leaf.grad = gradient.to(torch.float32).contiguous()
        for group in self.inner.param_groups:
            group["lr"] = lr
        self.inner.step()
        self.leaf.grad = None
        return self.leaf.detach()


class TrainedTensor(ABC):
    """One weight with all that belongs to it: where its gradient arrives, the optimizer's state, how it is written.

    ``name`` is that of its layer or parameter. ``index`` numbers its random streams. ``shape`` is that of what the
    inner optimizer steps: Δ's, or the parameter's own. It steps in ``parts``: whole, or by rows where that saves
    scratch memory and changes nothing.
    """

    module: nn.Module | None = None  # the layer whose weight this is; None for an ordinary parameter
    projected = False  # whether it has bases that are refreshed
    keeps_whole = False  # whether its rule needs the whole gradient in every step
    rule_name: str | None = None  # of the rule that makes its updates from whole gradients
    adaptive = False  # whether its rank is free to move
    by_rows = True  # whether row i of Δ moves nothing but row i of what is stored
    deciding = ALONE  # the team, led by the process whose gradient gives a basis
    shards = 1  # among how many processes the rows of what is stored are split
    gathered = 0  # times in a step that it is, outside of blocks
    owner: int | None = None  # the process that alone steps it, where weights are split; None: each steps its copy
    elsewhere = False  # whether that is another process than this one

    def __init__(self, name: str, index: int, shape: torch.Size) -> None:
        self.name, self.index, self.shape = name, index, shape
        self.parts: list[Part] = []

    # Where its gradient arrives.

    @property
    @abstractmethod
    def group(self) -> str:
        """The optimizer's parameter group: ``lowrank``, ``dense`` or ``vector``."""

    @property
    @abstractmethod
    def stored(self) -> Tensor:
        """What the update is written into."""

    @abstractmethod
    def leaves(self) -> list[nn.Parameter]:
        """The parameters that autograd fills. All of them listen to hooks, and ``arm`` leaves one of them on."""

    def listen(self, whole: bool) -> None:  # noqa: B027 - most have one leaf, which always listens
        """Let autograd fill the leaf of the ``whole`` gradient, or the other one."""

    @abstractmethod
    def arm(self, step: int) -> None:
        """Choose the leaf that the backward passes of ``step`` fill."""

    def freed(self) -> bool:
        """Whether a user has freed it since the last step, so that more leaves listen than :meth:`arm` leaves on."""
        return False

    @abstractmethod
    def gradient(self) -> Tensor | None:
        """The gradient that the next :meth:`step` takes; None if there is none, or a basis must be found first."""

    @abstractmethod
    def drop_gradient(self) -> None:
        """Free all gradients."""

    def holds_gradient(self) -> bool:
        """Whether this process has any gradient for it, a whole one included."""
        return self.gradient() is not None or any(leaf.grad is not None for leaf in self.leaves())

    def to_sum(self) -> list[Sum]:
        """The gradients here, which shall be those of all processes: in each of them, or in the owner."""
        gradients = [leaf.grad for leaf in self.leaves() if leaf.grad is not None]
        return [Sum(gradient, self.sent_in(gradient), self.owner) for gradient in gradients]

    def sent_in(self, gradient: Tensor) -> torch.dtype:
        """The dtype in which a ``gradient`` travels between processes."""
        return gradient.dtype

    def is_whole(self, leaf: nn.Parameter) -> bool:
        """Whether ``leaf`` receives the whole gradient of a layer whose Δ is smaller."""
        return False

    # Its subspace.

    def awaits_refresh(self) -> bool:
        """Whether a whole gradient is here from which a due basis can be found."""
        return False

    def seeks_first_basis(self) -> bool:
        """Whether it cannot step before it has found a basis."""
        return False

    def refresh(self, step: int, own: bool = False) -> dict[str, Any] | None:
        """Find a due basis from the gradient that is here; returns the record of the decision.

        ``own``: the gradient is this process's share alone, and not the sum that all of a team hold.
        """
        raise NotImplementedError(f"{self.name} has no basis")

    def refresh_counts(self, steps: int) -> tuple[int, int]:
        """(refreshes done, those that a schedule of fixed gaps would have done in the first ``steps`` steps)."""
        return 0, 0

    def waits(self, step: int) -> bool:
        """Whether a refresh was due before ``step`` and still waits for a gradient."""
        return False

    def turns_moments(self) -> bool:
        """Whether the inner optimizer has moments in a subspace that is refreshed."""
        return False

    @property
    def joins(self) -> Hashable:
        """Tensors of one such key may step together (``WholeTensor.step_together``); None: it steps alone."""
        return None

    def clamped_rank(self) -> int | None:
        """The rank that its rule uses, if the layer has no more than that; None if it is as asked."""
        return None

    # Its step.

    def attach(self, scratch: Scratch, factory: Factory, ranges: list[tuple[int, int]]) -> None:
        """Make a part of each range of rows: its leaf in ``scratch`` (held, large enough), and its inner optimizer."""
        for a, b in ranges:
            shape = (b - a, *self.shape[1:]) if len(self.shape) else ()
            leaf = nn.Parameter(scratch.flat[: torch.Size(shape).numel()].view(shape))
            self.parts.append(Part(a, leaf, factory([leaf]), scratch))

    def step(self, lr: float, scale: float, shrink: float, key: tuple[int, int]) -> None:
        """Step every part and write it back: ``W ← W(1 − shrink) + scale · update``, then drop the gradient.

        ``shrink`` is lr · weight decay. ``key`` names the stream of the random bits that round the weight.
        """
        gradient = self.gradient()
        assert gradient is not None, f"{self.name} has no gradient"
        for part in self.parts:
            mine = gradient if len(self.parts) == 1 else gradient[part.first : part.first + part.leaf.shape[0]]
            self.merge(part.step(mine, lr), part.first, scale, shrink, key)
        self.drop_gradient()

    @staticmethod
    def step_together(
        tensors: Sequence[Any], lr: float, scale: float, shrink: float, keys: Sequence[tuple[int, int]]
    ) -> None:
        """:meth:`step` of each of ``tensors``, which agree in what ``joins`` says, with one key for each."""
        for tensor, key in zip(tensors, keys, strict=True):
            tensor.step(lr, scale, shrink, key)

    def observation(self) -> Observation | None:
        """What was looked at in the step just taken, once; None in most steps."""
        return None

    @abstractmethod
    def merge(self, delta: Tensor, first: int, scale: float, shrink: float, key: tuple[int, int]) -> None:
        """Write the update that the fp32 ``delta`` stands for into the rows from ``first`` on."""

    # Where one process steps for all.

    def handed(self, owner: int, bases: bool, weights: bool = True) -> list[Handed]:
        """What the step of process ``owner`` has changed, for the others: ``bases`` after a refresh, and ``weights``.
        Of a split weight the block must be gathered."""
        raise NotImplementedError(f"{self.name} is stepped by every process")

    def finish_record(self) -> None:  # noqa: B027 - most have none
        """Add to the record of this step's refresh what the step did."""

    def outcome(self) -> dict[str, Any]:
        """What the other processes must know of a step of the owner, beside tensors."""
        return {}

    def follow(self, outcome: dict[str, Any]) -> None:  # noqa: B027 - most have none
        """Take what the owner's :meth:`outcome` says."""

    # What a checkpoint holds.

    def tensors(self) -> dict[str, Tensor]:
        """Its own state beside the model's tensors and the inner optimizer's; restored by copying into these."""
        return {}

    def progress(self) -> dict[str, Any]:
        """What a checkpoint must hold beside tensors."""
        return {}

    def restore(self, progress: dict[str, Any]) -> None:  # noqa: B027 - most have none
        """The inverse of :meth:`progress`, called before the moments are loaded."""

    def state(self) -> dict[str, Any]:
        """``inner``: the parts' optimizer states, with the part's number before each name where there are several;
        ``extra``: :meth:`tensors`; and :meth:`progress`."""
        inner: dict[str, Any] = {}
        for prefix, part in self._numbered():
            inner |= {prefix + name: value for name, value in part.state().items()}
        return {"inner": inner, "extra": self.tensors()} | self.progress()

    def load_state(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state`; values keep their dtypes."""
        self.restore(state)
        for prefix, part in self._numbered():
            mine = {n.removeprefix(prefix): value for n, value in state["inner"].items() if n.startswith(prefix)}
            part.set_state(mine)
        for name, value in self.tensors().items():
            value.copy_(state["extra"][name])

    def _numbered(self) -> list[tuple[str, Part]]:
        return [(f"{number}." if len(self.parts) > 1 else "", part) for number, part in enumerate(self.parts)]

    # For the plans of memory and of what processes send.

    @abstractmethod
    def traffic(self, gap: int) -> dict[str, float]:
        """Bytes that an ordinary step sends of it, by collective; see ``traffic.payload``."""

    def fill(self) -> None:  # noqa: B027 - most have a size that is fixed
        """Make this tensor, on the meta device, as large as it may become."""
