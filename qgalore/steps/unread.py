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

# Whose hooks do not look at values when a block is run again.
UNINTERESTED = ("qgalore.", "transformers.", "torch.distributed.")

Made = list[tuple[LowRankLinear, Any]]  # layers, and the node of autograd's graph that made what each returned


@contextmanager
def noted_outputs(block: nn.Module) -> Iterator[Made]:
    """Inside, where the outputs of ``block``'s low-rank layers come from is noted as they are made. Asked later, an
    output that was changed in place would name what changed it."""
    made: Made = []
    layers = [m for m in block.modules() if isinstance(m, LowRankLinear) and _is_plain(m)]

    def note(layer: nn.Module, _: tuple, output: Tensor) -> None:
        assert isinstance(layer, LowRankLinear)
        made.append((layer, output.grad_fn))

    handles = [layer.register_forward_hook(note) for layer in layers]
    try:
        yield made
    finally:
        for handle in handles:
            handle.remove()


def _is_plain(layer: LowRankLinear) -> bool:
    return "forward" not in vars(layer) and type(layer).forward is LowRankLinear.forward


def _is_watched(block: nn.Module) -> bool:
    """Whether somebody else has hooks in ``block``, which would be given zeros, or what comes of them."""
    hooks = (hook for m in block.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values()))
    return any(not str(getattr(hook, "__module__", "")).startswith(UNINTERESTED) for hook in hooks)


def unread(block: nn.Module, made: Made, output: Tensor, sides: Sequence[Tensor]) -> list[LowRankLinear]:
    """The layers in ``made`` whose outputs no gradient of ``output`` reads. What ``sides`` come from is read.

    A compiled block is one graph for both of its runs, so it computes everything. So does one with others' hooks.
    """
    if "forward" in vars(block) or _is_watched(block):
        return []
    only_added = _reached([output.grad_fn], through=_is_linear)
    # Whatever lies behind an operation that is not linear is read, wherever else it goes.
    linear = {node for node in only_added if _is_linear(node)}
    others = _reached([output.grad_fn]) - linear
    read = _reached([before for node in others for before in _before(node)])
    read |= _reached([side.grad_fn for side in sides])
    calls = [layer for layer, _ in made]
    return [layer for layer, node in made if node in only_added and node not in read and calls.count(layer) == 1]


def _is_linear(node: Any) -> bool:
    """Also a product with a number, or with what dropout on a CPU draws. Another constant may have been made of the
    value itself, as in x · (x > 0), or may be a parameter that trains later."""
    if node.name() != "MulBackward0" or len(_before(node)) != 1:
        return node.name() in LINEAR
    factor = node._saved_other if node._saved_self is None else node._saved_self
    if isinstance(factor, nn.Parameter):
        return False
    return factor.ndim == 0 or _is_dropout(factor)


def _is_dropout(factor: Tensor) -> bool:
    """Whether ``factor`` has two values: zero, and a number above 1 that makes up for what is lost. On the meta device,
    where plans are made, any is taken for it; of another kind of tensor whose values cannot be seen, none."""
    if factor.is_meta or type(factor) is not Tensor or not factor.is_floating_point():
        return factor.is_meta
    kept = factor[factor != 0]
    return bool(len(kept) and kept[0] > 1 and (kept == kept[0]).all())


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
def left_out(block: nn.Module, layers: Sequence[LowRankLinear]) -> Iterator[None]:
    """Inside, ``layers`` of ``block`` return zeros in place of their products, with the gradients of these. Where
    somebody has put hooks into the block since they were found, they compute as ever."""
    silent = [] if _is_watched(block) else layers
    for layer in silent:
        layer.unread = True
    try:
        yield
    finally:
        for layer in silent:
            layer.unread = False
