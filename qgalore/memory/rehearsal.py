"""Two steps on the meta device, taken by the real step and the real optimizer while a meter counts."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

from ..data.documents import Documents
from ..errors import ConfigError
from ..lowrank.hooks import HOOKS
from ..lowrank.optimizer import LowRankOptimizer
from ..lowrank.tensors.base import TrainedTensor
from ..models.attention import implementation, takes_documents
from ..replacing import replaced
from ..steps import activations
from ..steps.activations import Activations, Key, Store
from .meter import ON_HOST, REHEARSED, TEMPORARIES, Meter
from .stand_ins import ScheduleOnPaper

SCRATCH, WORKSPACE = "step scratch", "refresh and step workspace"
TRANSIENT = ("activations", "logits", "gradients", "full gradient", SCRATCH, WORKSPACE, TEMPORARIES)
Batch = dict[str, Tensor]


class Order(Protocol):
    """The way through a step that the trainer takes (``training.stepping``)."""

    def take(
        self,
        step: int,
        numbers: Sequence[int],
        batches: Sequence[Batch],
        share: Callable[[Batch], Tensor],
        look: Callable[[float], None],
    ) -> tuple: ...


@dataclass(frozen=True)
class Step:
    """What a rehearsal needs to know of a step: the loss (model, batch) → scalar, micro-batch and sequence, and for
    which kind of ``device``."""

    loss: Callable[[nn.Module, Batch], Tensor]
    micro_batch_size: int
    sequence_length: int
    masked: bool  # documents are isolated by a mask
    staggered: bool = True  # refreshes fall into different steps
    due_together: int = 1  # layers whose full gradients an ordinary step may ask for
    micro_batches: int = 1
    device: str = "cuda"
    layer_major: bool = False  # where the model can be walked
    rehearsed: int = REHEARSED  # of the micro-batches, if there are more
    slots: int = 0  # blocks with room on the device, if they live in host memory
    state_streamed: bool = False  # and the optimizer's state with them
    clips: bool = False  # they come once more, when the norm of all gradients is known


class PaperOptimizer(LowRankOptimizer):
    """The optimizer of a rehearsal, in manual stepping until :meth:`step_by_hooks`. It tells ``meter`` what it does."""

    meter: Meter | None = None

    def step_by_hooks(self, stepping: str) -> None:
        """Step as the hooks of ``stepping`` do. Call it after other hooks on gradients were registered."""
        self.stepping = stepping
        for leaf in (leaf for tensor in self.tensors for leaf in tensor.leaves()):
            leaf.requires_grad_(True)  # a hook needs it
        self.hooks = HOOKS[stepping](self)
        self.rearm()

    def rearm(self) -> None:
        for tensor in self.tensors:
            tensor.arm(self.step_count)

    def refresh_tensor(self, tensor: TrainedTensor, own_of: int | None = None) -> None:
        with self._at_work():
            super().refresh_tensor(tensor, own_of)
        if self.meter is not None:
            self.meter.count(tensor.gradient(), "full gradient" if tensor.keeps_whole else "gradients")

    def _apply(self, tensors: Sequence[TrainedTensor]) -> None:
        with self._at_work():
            super()._apply(tensors)

    def _at_work(self) -> AbstractContextManager:
        return nullcontext() if self.meter is None else self.meter.labelled(WORKSPACE)


class _Observed:
    """A store of a walk that tells the meter which micro-batch is at work: it asks for what it needs first."""

    def __init__(self, store: Store, meter: Meter) -> None:
        self.store, self.meter = store, meter
        self.put, self.clear = store.put, store.clear

    def get(self, block: int, number: int, *, drop: bool = True, ahead: Key | None = None) -> Tensor:
        self.meter.number, self.meter.label = number, "activations"
        return self.store.get(block, number, drop=drop, ahead=ahead)


def _observe(kept: Activations, meter: Meter) -> None:
    """Let ``meter`` know whose turn it is in a walk."""
    kept.inputs, kept.gradients = _Observed(kept.inputs, meter), _Observed(kept.gradients, meter)


def offloading_seen(meter: Meter) -> AbstractContextManager:
    """Inside, ``meter`` hears of what waits in host memory."""
    own = activations.host_buffer

    def labelled(tensor: Tensor) -> Tensor:
        with meter.labelled(ON_HOST):
            return own(tensor)

    return replaced([(activations, "host_buffer", labelled)])


class Rehearsal:
    """Steps of ``optimizer`` by ``order`` under ``meter``."""

    def __init__(self, model: nn.Module, optimizer: PaperOptimizer, step: Step, order: Order, meter: Meter) -> None:
        self.model, self.optimizer, self.step, self.order, self.meter = model, optimizer, step, order, meter
        self.count = min(step.rehearsed, step.micro_batches)
        optimizer.meter = meter

    def run(self) -> None:
        """A first step, which finds all bases, and an ordinary one in which the largest refreshes are due."""
        base = self.model.base_model
        base.register_forward_pre_hook(lambda *_: setattr(self.meter, "label", "activations"))
        base.register_forward_hook(lambda *_: setattr(self.meter, "label", "logits"))
        if isinstance(kept := getattr(self.order, "kept", None), Activations):
            _observe(kept, self.meter)
        for scratch in {id(part.scratch): part.scratch for t in self.optimizer.tensors for part in t.parts}.values():
            self.meter.vary(scratch.flat.untyped_storage(), SCRATCH)
        self._take(0)
        if self.step.staggered:
            self._make_due(self.step.due_together)
        self._take(1)

    def _make_due(self, together: int) -> None:
        """Let the refreshes of so many layers be due, the largest ones."""
        projected: list[Any] = [tensor for tensor in self.optimizer.tensors if tensor.projected]
        projected.sort(key=lambda tensor: tensor.module.probe.numel(), reverse=True)
        for place, tensor in enumerate(projected):
            tensor.schedule.now = place < together
        self.optimizer.rearm()

    def _take(self, number: int) -> None:
        batches: list[Batch] = [{} for _ in range(self.count)]
        if self.step.device == "cpu":  # elsewhere a micro-batch comes to the device when it is used
            for self.meter.number, batch in enumerate(batches):
                batch |= ids(self.step)
        self.meter.number, self.meter.label = None, TEMPORARIES
        self.numbers = {id(batch): place for place, batch in enumerate(batches)}
        self.order.take(number, range(self.count), batches, self._share, lambda loss: None)
        self.meter.number, self.meter.label = None, TEMPORARIES

    def _share(self, batch: Batch) -> Tensor:
        """As the training loop has it."""
        self.meter.number = self.numbers[id(batch)]
        batch = (batch or ids(self.step)) | mask(self.model, self.step)
        loss = self.step.loss(self.model, batch) / 1
        self.meter.label = TEMPORARIES
        return loss


def watch_gradients(optimizer: PaperOptimizer, meter: Meter) -> None:
    """Let ``meter`` know the gradients as they arrive."""

    def arrived(tensor: TrainedTensor, leaf: Tensor) -> None:
        meter.count(leaf.grad, "full gradient" if tensor.is_whole(leaf) else "gradients")

    for tensor in optimizer.tensors:
        for leaf in tensor.leaves():
            leaf.requires_grad_(True)  # a hook needs it
            leaf.register_post_accumulate_grad_hook(lambda leaf, tensor=tensor: arrived(tensor, leaf))
    optimizer.rearm()


def fill(tensors: Sequence[TrainedTensor], one: bool) -> None:
    """Make tensors whose rank is free as large as they may become: all, or the largest ``one``, where all gradients
    wait together and share the ranks' budget."""
    free = sorted((t for t in tensors if t.adaptive), key=lambda t: t.shape.numel(), reverse=True)
    for tensor in free[:1] if one else free:
        tensor.fill()


def on_paper_schedules(tensors: Sequence[TrainedTensor]) -> None:
    """Give ``tensors`` schedules that a rehearsal commands."""
    projected: list[Any] = [tensor for tensor in tensors if hasattr(tensor, "schedule")]
    for tensor in projected:
        tensor.schedule = ScheduleOnPaper(tensor.schedule.base_gap, tensor.schedule.first_gap)


def ids(step: Step) -> Batch:
    """A micro-batch without values, as the data have it."""
    shape = (step.micro_batch_size, step.sequence_length)
    names = ("input_ids", "position_ids", "labels")
    return {name: torch.zeros(shape, dtype=torch.int64, device="meta") for name in names}


def mask(model: nn.Module, step: Step) -> Batch:
    """The attention mask, or what stands in its place, which is given so that transformers looks at no values."""
    if takes_documents(model):
        return {"documents": documents(step)}
    if _reads_flat_mask(model):
        shape = (step.micro_batch_size, step.sequence_length)
        return {"attention_mask": torch.ones(shape, dtype=torch.int64, device="meta")}
    square = (step.micro_batch_size, 1, step.sequence_length, step.sequence_length)
    dtype = model.dtype if implementation(model) == "eager" else torch.bool
    made = torch.zeros(square if step.masked else (), dtype=dtype, device="meta")
    return {"attention_mask": made.expand(square)}


def documents(step: Step) -> Any:
    """What a row holds: one document, or two of which one is as long as can be, since calls keep squares of that
    length."""
    length = step.sequence_length
    return Documents([(length - 1, 1) if step.masked else (length,)] * step.micro_batch_size)


def _reads_flat_mask(model: nn.Module) -> bool:
    """Whether ``model`` makes distances (ALiBi) out of the mask, and so needs it as (rows, tokens)."""
    config: Any = model.config.get_text_config()
    return config.model_type == "bloom" or bool(getattr(config, "alibi", False))


def loss_or_refusal(step: Step) -> Callable[[nn.Module, Batch], Tensor]:
    """The loss, which raises :class:`ConfigError` for a model that cannot run without values."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        try:
            return step.loss(model, batch)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            _refuse(model, error)

    return loss


def _refuse(model: nn.Module, error: Exception) -> NoReturn:
    raise ConfigError(
        f"the memory of {type(model).__name__} cannot be planned: its forward pass fails on tensors without values "
        f"({error}). Check its config.json, or choose another architecture"
    ) from error
