"""The memory plan: what a run will need, byte by byte, before anything is allocated.

The plan is not a formula beside the trainer. It takes the trainer's own model on the meta device and lets it train for
two steps there, one that finds all first bases and an ordinary one, while every tensor that PyTorch makes is counted.
What cannot run without values (attention kernels, 8-bit moments, decisions on data) is replaced by its shapes.
"""

import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import ConfigError
from ..lowrank.layers.bases import Basis
from ..lowrank.layers.linear import LowRankLinear
from ..lowrank.subspace import search, sides
from ..lowrank.tensors.base import TrainedTensor
from ..lowrank.tensors.projected import ProjectedTensor
from ..quant.int8 import planned_for
from ..step import walk
from ..step.blocks import Layout
from ..step.trial import try_walk
from . import stand_ins, walked

CUDA_CONTEXT = 512 << 20  # CUDA context, cuBLAS workspaces and loaded kernels: assumed, not planned
RESIDENT = (
    "int8 weights",
    "weight scales",
    "bases",
    "trained in full",
    "moments",
    "fp32 masters",
    "buffers",
)
WORKSPACE = "refresh and step workspace"
SCRATCH = "step scratch"
TRANSIENT = ("activations", "logits", "gradients", "full gradient", SCRATCH, WORKSPACE, "temporaries")


@dataclass(frozen=True)
class Plan:
    """Bytes by category: ``resident`` between steps, ``transient`` more of them at the worst moment of a step, and
    ``outside`` of PyTorch's tensors."""

    resident: dict[str, int]
    transient: dict[str, int]
    outside: dict[str, int]

    @property
    def tensors(self) -> int:
        """Peak bytes in PyTorch tensors."""
        return sum(self.resident.values()) + sum(self.transient.values())

    @property
    def total(self) -> int:
        return self.tensors + sum(self.outside.values())

    def __str__(self) -> str:
        lines = []
        for title, sizes in (("resident", self.resident), ("at the peak", self.transient), ("outside", self.outside)):
            rows = [(name, size) for name, size in sizes.items() if size >= 1 << 10]
            for number, (name, size) in enumerate(rows):
                lines.append(f"  {title if number == 0 else '':<12}{name:<28}{human(size):>10}")
        return "\n".join([*lines, f"  {'total':<40}{human(self.total):>10}"])


def human(size: int) -> str:
    """``1536 → 1.5 KiB``."""
    for unit, step in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if abs(size) >= 1 << step:
            return f"{size / (1 << step):.2f} {unit}" if unit == "GiB" else f"{size / (1 << step):.1f} {unit}"
    return f"{size} B"


class _Meter(TorchDispatchMode):
    """Counts the storage of every tensor made while it is on, by the ``label`` in force, until it is freed. Those in
    ``present`` (storage identities) are there before and after, and not counted."""

    def __init__(self, present: set[int]) -> None:
        super().__init__()
        self.present = present
        self.label = "temporaries"
        self.live: Counter[str] = Counter()
        self.peak, self.at_peak = 0, Counter()
        self._known: dict[int, tuple[weakref.ref, str, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self.count(value)
        return result

    def count(self, tensor: Tensor, label: str | None = None) -> None:
        """Count ``tensor``'s storage if it is new, or move it to ``label``."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.present:
            return
        if key in self._known:
            if label is not None:
                _, old, size = self._known[key]
                self._move(key, old, label, size)
            return
        label = label or self.label
        size = storage.nbytes()
        self._known[key] = (weakref.ref(storage, lambda _: self._free(key)), label, size)
        self.live[label] += size
        self.look()

    def _move(self, key: int, old: str, new: str, size: int) -> None:
        self._known[key] = (self._known[key][0], new, size)
        self.live[old] -= size
        self.live[new] += size

    def _free(self, key: int) -> None:
        _, label, size = self._known.pop(key)
        self.live[label] -= size

    def look(self, extra: int = 0) -> None:
        """Compare the present moment, with ``extra`` bytes of workspace, with the worst one so far."""
        total = sum(self.live.values()) + extra
        if total > self.peak:
            self.peak = total
            self.at_peak = Counter(self.live)
            self.at_peak[WORKSPACE] += extra

    @contextmanager
    def labelled(self, label: str):
        before, self.label = self.label, label
        yield
        self.label = before


def _model_bytes(model: nn.Module) -> Counter[str]:
    """Bytes of a converted model's own tensors by category, shared ones once."""
    sizes: Counter[str] = Counter()
    seen: set[int] = set()
    for module in model.modules():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                sizes[_category(module, key, tensor)] += tensor.untyped_storage().nbytes()
    return sizes


def _category(module: nn.Module, key: str, tensor: Tensor) -> str:
    if isinstance(module, LowRankLinear) and key in module.leaves():
        return "buffers"  # one zero each
    if key == "weight" and tensor.dtype == torch.int8:
        return "int8 weights"
    if key == "weight_scale":
        return "weight scales"
    if isinstance(module, Basis):
        return "bases"
    return "trained in full"


@dataclass
class Step:
    """What :func:`plan` needs to know of a step: the loss (model, batch) → scalar, micro-batch and sequence, how often
    a micro-batch runs, whether tensors step inside backward, and on which kind of ``device``."""

    loss: Callable[[nn.Module, dict[str, Tensor]], Tensor]
    micro_batch_size: int
    sequence_length: int
    fused: bool
    masked: bool  # documents are isolated by a mask
    staggered: bool = True  # refreshes fall into different steps
    due_together: int = 1  # layers whose full gradients an ordinary step may ask for
    micro_batches: int = 1  # in a step; gradients wait while the second and later ones run
    device: str = "cuda"
    layer_major: bool = False  # where the model can be walked
    keeps: str = "graphs"  # of the blocks in layer-major steps; or "inputs", or "host": inputs in host memory
    clips: bool = False  # layer-major steps keep all gradients for the global norm


class _Rehearsal:
    """Two steps on the meta device under a meter."""

    def __init__(self, model: nn.Module, tensors: list[TrainedTensor], step: Step, meter: _Meter) -> None:
        self.model, self.tensors, self.step, self.meter = model, tensors, step, meter
        self._workspaces: dict[tuple, int] = {}
        self._scratch: Tensor | None = None  # stands for the leaves of all parts, while a step is taken
        self._tensor_of = {id(leaf): tensor for tensor in tensors for leaf in tensor.leaves()}

    def run(self, layout: Layout | None) -> None:
        """``layout``: that of layer-major steps, None for batch-major ones."""
        self.layout = layout
        for tensor in self.tensors:
            for leaf in tensor.leaves():
                leaf.requires_grad_(True)
                if layout is not None and self.step.micro_batches > 1:
                    leaf.grad_dtype = torch.float32  # as the trainer accumulates
                leaf.register_post_accumulate_grad_hook(lambda leaf, tensor=tensor: self._arrived(tensor, leaf))
        base = self.model.base_model
        base.register_forward_pre_hook(lambda *_: setattr(self.meter, "label", "activations"))
        base.register_forward_hook(lambda *_: setattr(self.meter, "label", "logits"))
        for first in (True, False):
            self._arm(first)
            self._take(first)

    def _arm(self, first: bool) -> None:
        """All probes in the first step; after it the largest ones, as if their refresh were due, or all again."""
        projected = [tensor for tensor in self.tensors if tensor.projected]
        projected.sort(key=lambda tensor: tensor.module.probe.numel(), reverse=True)
        every = first or not self.step.staggered
        self.due = {id(tensor) for tensor in (projected if every else projected[: self.step.due_together])}
        for tensor in projected:
            tensor.listen(id(tensor) in self.due)

    def _take(self, first: bool) -> None:
        self.first = first
        batch = example(self.model, self.step)
        if self.layout is not None:
            self._walk(batch, self.layout)
        else:
            for _ in range(min(2, self.step.micro_batches)):
                self._pass(batch)
        del batch
        for tensor in self.tensors:
            if id(tensor) in self.due and tensor.module.probe.grad is not None:  # an expert may get no tokens
                self._refresh(tensor)
        for tensor in self.tensors:
            if tensor.gradient() is not None:
                self._update(tensor)
        self._scratch = None

    def _walk(self, batch: dict[str, Tensor], layout: Layout) -> None:
        """All micro-batches, block by block; each block's tensors are stepped when it is done."""
        step = self.step
        kept = walked.activations(
            step.micro_batches,
            len(layout),
            graphs=step.keeps == "graphs",
            on_host=step.keeps == "host",
            live=lambda: sum(self.meter.live.values()),
        )
        walk.walk(
            layout,
            [lambda: self._loss(batch)] * walked.rehearsed(step.micro_batches),
            reseed=lambda number, part: kept.graphs.begins(),
            decide=lambda losses: True,
            step=self._block_done,
            activations=kept,
        )

    def _block_done(self, _: str, parameters: list[nn.Parameter]) -> None:
        found = (self._tensor_of.get(id(parameter)) for parameter in reversed(parameters))
        for tensor in dict.fromkeys(tensor for tensor in found if tensor is not None):
            if id(tensor) in self.due and tensor.module.probe.grad is not None:
                self._refresh(tensor)
            if tensor.gradient() is not None and not self.step.clips:
                self._update(tensor)

    def _pass(self, batch: dict[str, Tensor]) -> None:
        """One micro-batch, forward and back."""
        self._loss(batch).backward()

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Raises :class:`ConfigError` for a model that cannot run without values."""
        try:
            loss = self.step.loss(self.model, batch)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            raise ConfigError(
                f"the memory of {type(self.model).__name__} cannot be planned: its forward pass fails on tensors "
                f"without values ({error}). Check its config.json, or choose another architecture"
            ) from error
        self.meter.label = "temporaries"
        return loss

    def _arrived(self, tensor: TrainedTensor, leaf: Tensor) -> None:
        probe = tensor.is_whole(leaf)
        self.meter.count(leaf.grad, "full gradient" if probe else "gradients")
        tensor.received(leaf)
        if tensor.shared and not probe:
            self.meter.count(tensor.gradient(), "gradients")
        if self.layout is not None:
            return
        if id(tensor) in self.due and (self.step.fused or (self.first and not tensor.keeps_whole)):
            self._refresh(tensor)
        if self.step.fused:
            self._update(tensor)

    def _workspace(self, key: tuple, work: Callable[[], None]) -> None:
        """Let ``work`` count once for all tensors of the same shapes."""
        if key not in self._workspaces:
            with self.meter.labelled(WORKSPACE), _Meter(self.meter.present | set(self.meter._known)) as inner:
                work()
            self._workspaces[key] = inner.peak
        self.meter.look(self._workspaces[key])

    def _refresh(self, tensor: ProjectedTensor) -> None:
        module = tensor.module
        gradient = module.probe.grad
        key = ("refresh", tensor.shape, gradient.shape)
        self._workspace(key, tensor.at_ceiling(lambda: _find_bases(tensor, gradient)))
        self.due.discard(id(tensor))
        if tensor.keeps_whole:
            return
        module.probe.grad = None
        module.probe.requires_grad_(False)
        delta = torch.empty(module.delta.shape, dtype=module.delta.dtype, device="meta")
        module.delta.requires_grad_(True)
        tensor.take(delta, self.first)
        self.meter.count(tensor.gradient(), "gradients")

    def _update(self, tensor: TrainedTensor) -> None:
        key = ("step", tensor.shape, tensor.stored.shape, tensor.stored.dtype)
        if self._scratch is None:
            with self.meter.labelled(SCRATCH):
                self._scratch = torch.empty(tensor.parts[0].scratch.nbytes, dtype=torch.uint8, device="meta")
        self._workspace(key, tensor.at_ceiling(tensor.step_on_paper))
        tensor.drop_gradient()


def example(model: nn.Module, step: Step) -> dict[str, Tensor]:
    """A micro-batch without values."""
    shape = (step.micro_batch_size, step.sequence_length)
    names = ("input_ids", "position_ids", "labels")
    batch = {name: torch.zeros(shape, dtype=torch.int64, device="meta") for name in names}
    square = (step.micro_batch_size, 1, step.sequence_length, step.sequence_length)
    mask = torch.zeros(square if step.masked else (), dtype=torch.bool, device="meta")
    batch["attention_mask"] = mask.expand(square)  # given, so that transformers looks at no values
    if _reads_flat_mask(model):
        batch["attention_mask"] = torch.ones(shape, dtype=torch.int64, device="meta")
    return batch


def _reads_flat_mask(model: nn.Module) -> bool:
    """Whether ``model`` makes distances (ALiBi) out of the mask, and so needs it as (rows, tokens)."""
    config = model.config.get_text_config()
    return config.model_type == "bloom" or bool(getattr(config, "alibi", False))


def _find_bases(tensor: ProjectedTensor, gradient: Tensor) -> None:
    """The work of a refresh, with an old basis and moments that turn."""
    bases = (tensor.module.left, tensor.module.right)
    columns = []
    for basis, matrix in zip(bases, (gradient.T, gradient), strict=True):
        if basis is None:
            columns.append(None)
            continue
        old = search.orthonormal(basis.columns())
        if tensor.options.method == "exact":
            columns.append(search.exact_basis(matrix, basis.rank))
        else:
            columns.append(search.randomized_basis(matrix, basis.rank, None, old, tensor.options.power_iterations))
        del old
    for basis, new in zip(bases, columns, strict=True):
        if basis is not None:
            basis.assign(new)
    sides.project(gradient, *columns, tensor.module.delta.dtype)
    turned = tensor.parts[0].leaf  # moments turn part by part
    [torch.empty(turned.shape, device="meta") for _ in range(3)]


class Adam8bitShapes(Optimizer):
    """The states of an 8-bit Adam without their values: bytes and block scales as ``adamw8bit`` keeps them."""

    BLOCK, SMALL = 256, 4096

    def __init__(self, params, lr: float = 0.0) -> None:
        super().__init__(params, {"lr": lr})

    def _states(self, leaf: Tensor) -> dict[str, Tensor]:
        if leaf.numel() < self.SMALL:
            return {name: torch.empty_like(leaf) for name in ("state1", "state2")}
        blocks = -(-leaf.numel() // self.BLOCK)
        states = {name: torch.empty_like(leaf, dtype=torch.uint8) for name in ("state1", "state2")}
        states |= {name: torch.empty(blocks, device=leaf.device) for name in ("absmax1", "absmax2")}
        return states | {name: torch.empty(256, device=leaf.device) for name in ("qmap1", "qmap2")}

    def step(self, closure=None) -> None:
        """Nothing moves: the kernels work in place, in tiles that do not count."""
        for leaf in (leaf for group in self.param_groups for leaf in group["params"] if leaf not in self.state):
            self.state[leaf] = self._states(leaf)


def state_bytes(tensors: list[TrainedTensor]) -> int:
    """Bytes of all that the inner optimizers of ``tensors`` keep, shared ones once."""
    sizes = {}
    for part in (part for tensor in tensors for part in tensor.parts):
        for value in part.state().values():
            if torch.is_tensor(value):
                sizes[value.untyped_storage()._cdata] = value.untyped_storage().nbytes()
    return sum(sizes.values())


def _extra_bytes(tensors: list[TrainedTensor]) -> int:
    """Bytes of what ``tensors`` keep beside the model's tensors and the inner optimizers'."""
    return sum(value.untyped_storage().nbytes() for tensor in tensors for value in tensor.tensors().values())


def resident(model: nn.Module, tensors: list[TrainedTensor]) -> dict[str, int]:
    """Bytes by category of all that is kept between steps, for a model (on the meta device, say) with attached ones."""
    for part in (part for tensor in tensors for part in tensor.parts):
        if part.leaf.numel():  # a rule without moments never steps its own
            part.step(torch.zeros_like(part.leaf), 0.0)  # for the inner optimizers to make their states
    sizes = _model_bytes(model)
    for layer, own in ((tensor.module, tensor.mine) for tensor in tensors if tensor.shared):
        sizes[_category(layer, "weight", own.weight)] -= layer.weight.nbytes - own.weight.nbytes
        if own.weight_scale is not None:
            sizes["weight scales"] -= layer.weight_scale.nbytes - own.weight_scale.nbytes
    of_rules = [tensor for tensor in tensors if tensor.keeps_whole]
    sizes["moments"] = state_bytes(tensors) + _extra_bytes(of_rules)
    sizes["fp32 masters"] = _extra_bytes([tensor for tensor in tensors if tensor not in of_rules])
    return {name: sizes[name] for name in RESIDENT}


def plan(model: nn.Module, tensors: list[TrainedTensor], step: Step, outside: dict[str, int]) -> Plan:
    """The plan for training ``model`` (converted, all on the meta device) with ``tensors`` attached to meta scratch.

    ``outside``: bytes beyond PyTorch's tensors, by name.
    """
    kept_bytes = resident(model, tensors)
    model.train()
    # Any layer's gradient of Δ, one at a time; those that wait together share the ranks' budget.
    if step.fused or step.layer_major:
        for tensor in tensors:
            tensor.fill()
    kept = [*model.parameters(), *model.buffers(), *(part.leaf for tensor in tensors for part in tensor.parts)]
    kept += [value for tensor in tensors for value in tensor.tensors().values()]
    states = [value for tensor in tensors for part in tensor.parts for value in part.state().values()]
    kept += [value for value in states if torch.is_tensor(value)]
    meter = _Meter({value.untyped_storage()._cdata for value in kept})
    with planned_for(step.device), stand_ins.kernels(step.device):
        layout = try_walk(model, example(model, step), step.loss).layout if step.layer_major else None
        with meter:
            _Rehearsal(model, tensors, step, meter).run(layout)
    return Plan(kept_bytes, {name: meter.at_peak[name] for name in TRANSIENT}, outside)
