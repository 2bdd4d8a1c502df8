"""Tensors inside tuples, lists and dictionaries, and the leaves behind their graphs."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor


def replaced(value: Any, change: Callable[[Any], Any], kind: type = Tensor) -> Any:
    """``value`` with every tensor (or other ``kind``) in its tuples, lists and dictionaries replaced by
    ``change(tensor)``."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(replaced(item, change, kind) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(replaced(item, change, kind) for item in value)
    if type(value) is dict:
        return {name: replaced(item, change, kind) for name, item in value.items()}
    return value


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in ``value``, in a fixed order."""
    found: list[Tensor] = []
    replaced(value, found.append)
    return found


def leaves_of(tensors: Iterable[Tensor]) -> dict[int, Tensor]:
    """The leaves whose gradients a backward pass from ``tensors`` would fill, by their identity."""
    roots = [tensor for tensor in tensors if tensor.requires_grad]
    found = {id(tensor): tensor for tensor in roots if tensor.grad_fn is None}
    waiting, seen = [tensor.grad_fn for tensor in roots if tensor.grad_fn is not None], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found[id(leaf)] = leaf
        waiting += [before for before, _ in node.next_functions]
    return found
