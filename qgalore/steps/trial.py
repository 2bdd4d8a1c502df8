"""Whether a model can be walked block by block, found by trying."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..lowrank.layers.product_choice import none_tried
from . import blocks
from .blocks import Layout, NotWalkableError, Run
from .nested import leaves_of, tensors_in
from .prologue import prologue
from .unread import noted_outputs, unread

Loss = Callable[[nn.Module, Any], Tensor]
TOLERANCE = 1e-5  # of the losses, relative: the same kernels on the same values, but some add in no fixed order


@dataclass(frozen=True)
class Trial:
    """``layout``: the model's parts, or None if it cannot be walked; ``why`` then says it in a sentence."""

    layout: Layout | None
    why: str | None = None

    def __str__(self) -> str:
        if self.layout is None:
            return f"the model steps as one block, with ordinary accumulation: {self.why}"
        return f"the model is walked through the {len(self.layout)} blocks of {self.layout.name}"


def try_walk(model: nn.Module, batch: Any, loss: Loss, *, stance: str = "force_eager") -> Trial:
    """Find ``model``'s blocks and walk forward through them once with ``batch``, as ``loss(model, batch)`` uses it.

    No gradient is left, no random number drawn and no int8 product chosen, as far as others can tell. The model is
    tried in the mode it is in: put it into training mode first. On the meta device, where a plan is made, losses cannot
    be compared. ``stance``: of the compiler; by default compiled blocks run as written, for no step would use a graph
    of the trial.
    """
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}

    def run() -> Tensor:
        return loss(model, batch)

    with torch.random.fork_rng(devices=devices), none_tried(model), torch.compiler.set_stance(stance):
        layout = _find(model, run)
        if layout is None:
            return Trial(None, "it has no list of blocks that are called once each, in their order")
        with blocks.without_checkpointing(layout.blocks):
            expected = _ordinary_loss(layout, run)
            try:
                found = _walked_loss(model, layout, run)
            except NotWalkableError as reason:
                return Trial(None, str(reason))
            except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError) as error:
                reason = (str(error).strip().splitlines() or [""])[0]
                return Trial(None, f"its blocks do not run by themselves ({type(error).__name__}: {reason})")
    found = found.detach()
    if not _agree(found, expected):
        return Trial(None, f"its loss is {float(found):.6g} when walked, and {float(expected):.6g} otherwise")
    return Trial(layout)


def _agree(found: Tensor, expected: Tensor) -> bool:
    return expected.is_meta or abs(float(found) - float(expected)) <= TOLERANCE * abs(float(expected))


def _seed(part: int) -> None:
    torch.manual_seed(part)


@contextmanager
def _noted_calls(lists: list[nn.ModuleList]) -> Iterator[list[tuple[nn.Module, Any]]]:
    """Inside, every call of a module that stands in one of the ``lists`` is noted, with its output."""
    calls: list[tuple[nn.Module, Any]] = []
    modules = {id(module): module for entries in lists for module in entries}
    handles = [m.register_forward_hook(lambda m, _, output: calls.append((m, output))) for m in modules.values()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _find(model: nn.Module, run: Run) -> Layout | None:
    """The list with the most parameters whose modules are called once each, in order; the outermost of equal ones."""
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    with _noted_calls(list(lists.values())) as calls, torch.no_grad():
        run()
    best, most = None, 0
    for name, entries in lists.items():
        own = {id(module) for module in entries}
        mine = [(module, output) for module, output in calls if id(module) in own]
        size = sum(p.numel() for p in entries.parameters())
        if size <= most or [module for module, _ in mine] != list(entries):
            continue
        kinds = {len(output) if isinstance(output, tuple) else None for _, output in mine}
        firsts = [output[0] if isinstance(output, tuple) and output else output for _, output in mine]
        if len(kinds) == 1 and all(isinstance(first, Tensor) for first in firsts):
            best, most = Layout(name, entries, kinds.pop()), size
    return best


@torch.no_grad()
def _ordinary_loss(layout: Layout, run: Run) -> Tensor:
    """The loss of the whole model, with the random numbers of each part drawn from the seeds of the trial."""
    own = list(layout.blocks)

    def act(number: int, args: tuple, kwargs: dict[str, Any]) -> Any:
        _seed(number + 1)
        output = own[number](*args, **kwargs)
        if number == len(own) - 1:
            _seed(len(own) + 1)
        return output

    _seed(0)
    with blocks.stood_in(layout.blocks, act):
        return run()


def _walked_loss(model: nn.Module, layout: Layout, run: Run) -> Tensor:
    """The loss when walked. Fills in what ``layout`` does not know yet."""
    inside = {id(p) for p in layout.blocks.parameters()}
    layout.outside = [p for p in model.parameters() if id(p) not in inside]
    layout.sides = [[m for m in block.modules() if blocks.observers(m)] for block in layout.blocks]
    _seed(0)
    start = prologue(layout, run)
    used, sides, inputs, hidden = [set(start.leaves)], [], [], start.hidden
    assert hidden is not None, "a prologue gives a hidden state"
    with torch.enable_grad():
        for number, block in enumerate(layout.blocks):
            inputs.append(hidden.detach().requires_grad_())
            _seed(number + 1)
            with noted_outputs(block) as made:
                output, found = blocks.run_block(layout, number, start.calls[number], inputs[-1], start.autocast)
            layout.unread.append(unread(block, made, output, blocks.with_gradient(found)))
            if output.shape != hidden.shape:
                raise NotWalkableError(f"block {number} turns {tuple(hidden.shape)} into {tuple(output.shape)}")
            reached = leaves_of([output, *blocks.with_gradient(found)])
            _refuse_side_ways(f"block {number}", reached, inputs[:-1])
            used.append(set(reached) | {id(p) for p in block.parameters()})
            hidden = output.detach()
            sides.append(blocks.as_leaves(found))
        hidden.requires_grad_()
        _seed(0)
        loss = blocks.epilogue(layout, run, start.places, hidden, sides, lambda: _seed(len(layout) + 1))
    if loss.requires_grad:
        reached = leaves_of([loss])
        _refuse_side_ways("what follows the blocks", reached, inputs)
        used.append(set(reached))
        layout.sides = [[m for m, o in side if _matters(o, reached)] for side in sides]
    layout.late, layout.before, layout.behind = _late(model, used), used[0], used[-1]
    return loss


def _refuse_side_ways(part: str, reached: dict[int, Tensor], inputs: list[Tensor]) -> None:
    """Raise :class:`NotWalkableError` if a part's gradients also go to the inputs of other blocks."""
    if any(id(tensor) in reached for tensor in inputs):
        raise NotWalkableError(f"{part} takes something with a gradient from an earlier block, beside its arguments")


def _matters(output: Any, reached: dict[int, Tensor]) -> bool:
    return any(id(tensor) in reached for tensor in tensors_in(output))


def _late(model: nn.Module, used: list[set[int]]) -> set[int]:
    """The parameters that several parts use, and their neighbours in the same modules: which of a layer's leaves gets
    the gradient changes from step to step."""
    late: set[int] = set()
    for module in model.modules():
        own = {id(p) for p in module.parameters(recurse=False)}
        if sum(not own.isdisjoint(part) for part in used) > 1:
            late |= own
    return late
