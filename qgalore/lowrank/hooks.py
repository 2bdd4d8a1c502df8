"""Autograd hooks, for a training loop that knows only ``loss.backward()`` and ``optimizer.step()``.

*Fused*: each tensor steps inside backward, as soon as its gradient is complete; ``step()`` then only closes the step.
*Deferred*: gradients are kept until ``step()``. In both the very first bases are found in one process's share of the
gradient, its first micro-batch, so that the whole gradients of all layers never exist together, nor travel. Those of a
mixture's expert are found in the first micro-batch that has tokens for it.
"""

import weakref
from collections.abc import Iterable
from functools import partial

import torch
from torch import nn

from .tensor_steps import TensorSteps
from .tensors.base import TrainedTensor


class Fused:
    """Step each tensor when its gradient arrives."""

    def __init__(self, optimizer: TensorSteps) -> None:
        self.optimizer: TensorSteps = weakref.proxy(optimizer)  # it holds this, and goes as soon as it is dropped
        self.idle = optimizer.idle
        self._summed = False  # whether the gradients here are those of the whole team already
        for tensor in optimizer.tensors:
            for leaf in tensor.leaves():
                handle = leaf.register_post_accumulate_grad_hook(partial(self.arrived, tensor))
                weakref.finalize(optimizer, handle.remove).atexit = False

    def arrived(self, tensor: TrainedTensor, leaf: nn.Parameter) -> None:
        """Autograd hook: ``leaf.grad`` now holds a micro-batch's contribution, or an expert's has none."""
        if tensor.name in self.optimizer.stepped:
            raise RuntimeError(
                f"{tensor.name} received a second gradient before step(): fused stepping takes one backward pass a "
                "step. For gradient accumulation build the optimizer with stepping='deferred'."
            )
        if self._unwanted(tensor, leaf):
            return
        source = self.idle.lowest(tensor, leaf) if self.idle.sometimes else 0
        if source is not None:
            self.optimizer.step_tensor(tensor, source)

    def _unwanted(self, tensor: TrainedTensor, leaf: nn.Parameter) -> bool:
        """Whether ``leaf`` should not listen in this step, as in a layer that a user has freed. It then has none."""
        if tensor.freed():
            tensor.arm(self.optimizer.step_count)
        if not leaf.requires_grad:
            leaf.grad = None
        return not leaf.requires_grad

    def nothing_came(self, layers: Iterable[nn.Module]) -> None:
        """No token of a micro-batch has come to ``layers``: all meet here, as others may have some."""
        inside = [p for layer in layers for p in reversed(list(layer.parameters()))]  # in the order of a backward pass
        for leaf in [p for p in inside if p.requires_grad]:  # which a refresh changes
            if id(leaf) in self.idle.sometimes:
                self.arrived(self.idle.sometimes[id(leaf)], leaf)

    def refresh(self) -> None:
        """For tensors that hold a gradient at ``step()``: those that backward did not fill, or none."""
        self._sum_over_team()
        self._refresh_due({})

    def close(self) -> None:
        """The step is over."""
        self._summed = False

    def _sum_over_team(self) -> None:
        """Once a step, sum the gradients of all processes. One without a share has zeros."""
        team = self.optimizer.team
        if team.size == 1 or self._summed:
            return
        leaves = [leaf for tensor in self.optimizer.tensors for leaf in tensor.leaves()]
        held = team.any("which tensors have gradients", [leaf.grad is not None for leaf in leaves])
        leaves = [leaf for leaf, has in zip(leaves, held, strict=True) if has]
        for leaf in leaves:
            if leaf.grad is None:
                leaf.grad = torch.zeros(leaf.shape, dtype=leaf.grad_dtype, device=leaf.device)
        team.sum_("the gradients of a step", [leaf.grad for leaf in leaves if leaf.grad is not None])
        self._summed = True

    def _refresh_due(self, order: dict[str, int]) -> None:
        due = [tensor for tensor in self.optimizer.tensors if tensor.awaits_refresh()]
        if due:
            self._check_all()
        for tensor in sorted(due, key=lambda tensor: order.get(tensor.name, len(order))):
            self.optimizer.refresh_tensor(tensor)

    def _check_all(self) -> None:
        """Look at every gradient before a basis changes: a step that fails must leave no trace."""
        for tensor in self.optimizer.tensors:
            for gradient in (*(leaf.grad for leaf in tensor.leaves()), tensor.gradient()):
                if gradient is not None and not torch.isfinite(torch.linalg.vector_norm(gradient)):
                    self.optimizer.complain(tensor)


class Deferred(Fused):
    """Keep gradients until ``step()``, but for those that first bases are found from."""

    def __init__(self, optimizer: TensorSteps) -> None:
        super().__init__(optimizer)
        self._arrived: dict[str, None] = {}  # in the order of the backward pass, in which fused stepping refreshes

    def arrived(self, tensor: TrainedTensor, leaf: nn.Parameter) -> None:
        if self._unwanted(tensor, leaf):
            return
        self._arrived[tensor.name] = None
        first = tensor.seeks_first_basis()
        source = self.idle.lowest(tensor, leaf) if first else 0
        if source is None:
            return
        if first and tensor.awaits_refresh():
            self.optimizer.refresh_tensor(tensor, source)

    def refresh(self) -> None:
        """Sum the gradients of all processes, and refresh what is due in the order of the backward pass."""
        self._sum_over_team()
        self._refresh_due({name: place for place, name in enumerate(self._arrived)})

    def close(self) -> None:
        super().close()
        self._arrived.clear()


HOOKS = {"fused": Fused, "deferred": Deferred}
