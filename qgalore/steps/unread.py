"""The products that a block need not compute when it is run again for its gradients.

A block mostly ends with a product that is added to its input: Y = H + X Wᵀ. No gradient reads the value of such a
product, and the block's output is known from its first run. So zeros may stand in its place: the gradients of H, X and
W's leaves keep every bit. In a Llama this is ``down_proj``, 22 % of a block's products.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..lowrank.layers.linear import LowRankLinear

# Operations that are linear in what they are given, and whose gradients therefore read no value of it.
LINEAR = {"AddBackward0", "ViewBackward0", "UnsafeViewBackward0", "ToCopyBackward0", "NativeDropoutBackward0"}

Made = list[tuple[LowRankLinear, Tensor]]  # layers, and what each returned


@contextmanager
def noted_outputs(block: nn.Module) -> Iterator[Made]:
    """Inside, the outputs of ``block``'s low-rank layers are noted as they are made."""
    made: Made = []
    layers = [m for m in block.modules() if isinstance(m, LowRankLinear) and not _watched(m)]

    def note(layer: nn.Module, _: tuple, output: Tensor) -> None:
        assert isinstance(layer, LowRankLinear)
        made.append((layer, output))

    handles = [layer.register_forward_hook(note) for layer in layers]
    try:
        yield made
    finally:
        for handle in handles:
            handle.remove()


def _watched(layer: LowRankLinear) -> bool:
    """Whether somebody else sees what ``layer`` returns, or it is made in another way than a linear layer's."""
    return bool(layer._forward_hooks) or "forward" in vars(layer) or type(layer).forward is not LowRankLinear.forward


def unread(block: nn.Module, made: Made, output: Tensor, sides: Sequence[Tensor]) -> list[LowRankLinear]:
    """The layers in ``made`` whose outputs no gradient of ``output`` reads. What ``sides`` come from is read.

    A compiled block is one graph for both of its runs, so it computes everything.
    """
    if "forward" in vars(block):
        return []
    only_added = _reached([output.grad_fn], through=_is_linear)
    others = [node for node in _reached([output.grad_fn]) if not _is_linear(node)]
    read = _reached([before for node in others for before in _before(node)])
    read |= _reached([side.grad_fn for side in sides])
    calls = [layer for layer, _ in made]
    return [
        layer
        for layer, value in made
        if value.grad_fn in only_added and value.grad_fn not in read and calls.count(layer) == 1
    ]


def _is_linear(node: Any) -> bool:
    """Also a product with one factor that is a constant, as dropout on a CPU makes it."""
    return node.name() in LINEAR or (node.name() == "MulBackward0" and len(_before(node)) == 1)


def _before(node: Any) -> list[Any]:
    return [before for before, _ in node.next_functions if before is not None]


def _reached(nodes: Sequence[Any], through: Any = lambda node: True) -> set[Any]:
    """The nodes of autograd's graph that ``nodes`` come from, and they themselves; beyond a node only if ``through``
    says so."""
    found, waiting = set(), [node for node in nodes if node is not None]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += _before(node) if through(node) else []
    return found


@contextmanager
def left_out(layers: Sequence[LowRankLinear]) -> Iterator[None]:
    """Inside, ``layers`` return zeros in place of their products, with the gradients of these."""
    for layer in layers:
        layer.unread = True
    try:
        yield
    finally:
        for layer in layers:
            layer.unread = False
