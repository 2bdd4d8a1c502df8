"""What of a trained tensor steps together, and the scratch memory that it does so in."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

SHARED_STATE = "qmap"  # what bitsandbytes keeps once for all tensors


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
