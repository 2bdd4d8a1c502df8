"""The memory plan: what a run will need, byte by byte, before anything is allocated.

The plan is not a formula beside the trainer. It takes the trainer's own model, step and optimizer on the meta device
and lets them train for two steps there, one that finds all first bases and an ordinary one, while every tensor that
PyTorch makes is counted. What cannot run without values is replaced by its shapes (see ``stand_ins``).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from ..quant.int8 import planned_for
from ..steps.blocks import Layout
from ..steps.trial import try_walk
from .meter import Meter
from .rehearsal import (
    TRANSIENT,
    Order,
    PaperOptimizer,
    Rehearsal,
    Step,
    fill,
    ids,
    loss_or_refusal,
    mask,
    offloading_seen,
    watch_gradients,
)
from .resident import resident, tensors_kept
from .stand_ins import kernels
from .streamed import Streamed, blocks_to_stream, check_blocks, on_paper, page_locked

INPUTS = "block inputs (page-locked)"  # in Plan.host
CUDA_CONTEXT = 512 << 20  # CUDA context, cuBLAS workspaces and loaded kernels: assumed, not planned


@dataclass(frozen=True)
class Plan:
    """Bytes by category: ``resident`` between steps, ``transient`` more of them at the worst moment of a step, and
    ``outside`` of PyTorch's tensors. ``host``: what waits in host memory for a device of another kind. ``walked``:
    whether the steps are layer-major. ``streamed``: the blocks' records, if they live in host memory."""

    resident: dict[str, int]
    transient: dict[str, int]
    outside: dict[str, int]
    host: dict[str, int] = field(default_factory=dict)
    walked: bool = False
    streamed: Streamed | None = None

    @property
    def tensors(self) -> int:
        """Peak bytes in PyTorch tensors."""
        return sum(self.resident.values()) + sum(self.transient.values())

    @property
    def total(self) -> int:
        return self.tensors + sum(self.outside.values())

    @property
    def host_total(self) -> int:
        return sum(self.host.values())

    def numbers(self) -> dict[str, dict[str, int] | bool]:
        """All of it as JSON can hold it."""
        found = {name: value for name, value in vars(self).items() if name != "streamed"}
        if self.streamed is not None:
            found["copies"] = {"in": self.streamed.bytes_in(), "out": self.streamed.bytes_out()}
        return found

    def __str__(self) -> str:
        parts = (("resident", self.resident), ("at the peak", self.transient), ("outside", self.outside))
        lines = [line for title, sizes in parts for line in _rows(title, sizes)]
        lines += [f"  {'total':<40}{human(self.total):>10}", *_rows("host", self.host)]
        return "\n".join([*lines, f"  {'host total':<40}{human(self.host_total):>10}"])


def _rows(title: str, sizes: dict[str, int]) -> list[str]:
    shown = [(name, size) for name, size in sizes.items() if size >= 1 << 10]
    return [f"  {'' if n else title:<12}{name:<28}{human(size):>10}" for n, (name, size) in enumerate(shown)]


def human(size: int) -> str:
    """``1536 → 1.5 KiB``."""
    for unit, step in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if abs(size) >= 1 << step:
            return f"{size / (1 << step):.2f} {unit}" if unit == "GiB" else f"{size / (1 << step):.1f} {unit}"
    return f"{size} B"


def plan(
    model: nn.Module,
    optimizer: PaperOptimizer,
    step: Step,
    stepping: str,
    order: Callable[[Layout | None], Order],
    outside: dict[str, int],
) -> Plan:
    """The plan for training ``model`` (converted, on the meta device) with ``optimizer``. ``order`` makes the trainer's
    order of a step from the model's parts, or from None if it is not walked; then the optimizer's hooks take
    ``stepping``. ``outside``: bytes beyond PyTorch's tensors, by name."""
    kept_bytes, streamed = resident(model, optimizer.tensors), None
    model.train()
    with torch.random.fork_rng(devices=[]), planned_for(step.device), kernels(step.device):
        layout = _parts(model, step)
        if step.slots:
            streamed = _streamed(model, optimizer, step, layout)
            kept_bytes = resident(model, optimizer.tensors, streamed.storages()) | streamed.on_device()
        fill(optimizer.tensors, one=layout is None and stepping == "deferred")
        present = {value.untyped_storage()._cdata for value in tensors_kept(model, optimizer.tensors)}
        meter = Meter(present, max(0, step.micro_batches - step.rehearsed), page_locked)
        watch_gradients(optimizer, meter)
        if layout is None:
            optimizer.step_by_hooks(stepping)
        with meter, offloading_seen(meter):
            Rehearsal(model, optimizer, step, order(layout), meter).run()
    host = {INPUTS: meter.host_peak}
    if streamed is not None:
        host = {"blocks (page-locked)": streamed.host_bytes} | host
    if step.device != "cpu":
        host["micro-batches"] = step.micro_batches * sum(value.nbytes for value in ids(step).values())
    peak = {name: meter.at_peak[name] for name in TRANSIENT}
    return Plan(kept_bytes, peak, outside, host, layout is not None, streamed)


def _streamed(model: nn.Module, optimizer: PaperOptimizer, step: Step, layout: Layout | None) -> Streamed:
    """The records of the blocks. Raises :class:`ConfigError` for a model that is not walked through all of them."""
    blocks = blocks_to_stream(model)
    check_blocks(model, layout, blocks)
    return on_paper(model, blocks, optimizer.tensors, step.slots, step.state_streamed, step.clips, step.device)


def _parts(model: nn.Module, step: Step) -> Layout | None:
    """The parts of a model that is walked. Raises :class:`ConfigError` for one that cannot run without values."""
    batch, loss = ids(step) | mask(model, step), loss_or_refusal(step)
    if step.layer_major:
        return try_walk(model, batch, loss).layout
    with torch.no_grad():
        loss(model, batch)
    return None
