"""What a training step does, counted by running it on PyTorch's meta device: nothing is estimated from shapes alone.

Products, elementwise traffic and launches are those of the operations that the code really calls. What kernels do there
is counted as one launch each, with the bytes that it reads and writes.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ..lowrank.layers.linear import LowRankLinear
from ..lowrank.tensors.base import TrainedTensor
from ..models import liger
from ..quant import dispatch, int8, int8_products
from ..replacing import replaced
from ..steps.unread import noted_outputs, unread

_NO_WORK = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "lift_fresh")
_BACKWARD = 2.5  # an attention's backward pass, in forward passes: five products where there are two
_SMALL = 4096  # values below which Adam keeps fp32 moments, in several operations
_ADAM_BYTES = 16  # of a value: the gradient, Δ read and written, and both moments' codes read and written


@dataclass
class Counts:
    """``products``, ``attention``, ``merge``: operations in bf16; ``integers``: in int8; ``moved``: bytes read and
    written by elementwise operations, ``formats``: by the kernels that read and write stored weights; ``launches`` of
    kernels; ``waits``: how often the CPU waits for the GPU."""

    products: float = 0.0
    integers: float = 0.0
    attention: float = 0.0
    merge: float = 0.0
    moved: float = 0.0
    formats: float = 0.0
    launches: float = 0.0
    waits: float = 0.0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, times: float) -> "Counts":
        return Counts(*(getattr(self, f.name) * times for f in fields(self)))


@dataclass
class _Meter(TorchDispatchMode):
    """Counts into ``here``, and an attention's backward pass into ``later``."""

    here: Counts = field(default_factory=Counts)
    later: float = 0.0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet in flop_registry:
            self.here.products += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
            self.here.launches += 1
            return out
        written = any(
            argument.alias_info is not None and argument.alias_info.is_write for argument in func._schema.arguments
        )
        if not written and (_same_memory(args, out) or _name(func) in _NO_WORK):
            return out
        self.here.launches += 1
        self.here.moved += sum(map(_bytes, (*args, *(kwargs or {}).values(), *((out,) if not written else ()))))
        if written:
            self.here.moved += _bytes(args[0]) if args else 0
        return out

    def kernel(self, size: float, launches: int = 1) -> None:
        self.here.formats += size
        self.here.launches += launches


def _name(func) -> str:
    return func._schema.name.split("::")[1]


def _same_memory(args: tuple, out: Any) -> bool:
    """Whether ``out`` is a view of one of ``args``, for which nothing is launched."""
    if not isinstance(out, Tensor):
        return not isinstance(out, (tuple, list)) or all(_same_memory(args, value) for value in out)
    storages = {value.untyped_storage()._cdata for value in args if isinstance(value, Tensor)}
    return out.untyped_storage()._cdata in storages


def _bytes(value: Any) -> float:
    """Bytes of what is really stored: an expanded tensor is read once."""
    if isinstance(value, (list, tuple)):
        return sum(map(_bytes, value))
    if not isinstance(value, Tensor):
        return 0.0
    size = float(value.element_size())
    for length, stride in zip(value.shape, value.stride(), strict=True):
        size *= length if stride else 1
    return size


Swaps = list[tuple[Any, str, Callable]]  # as ``replaced`` takes them


@contextmanager
def _kernels_counted(meter: _Meter) -> Iterator[None]:
    """Let what kernels do be counted as theirs, where it runs on the meta device."""
    with replaced([*_stored_formats(meter), *_arithmetic(meter)]):
        yield


def _stored_formats(meter: _Meter) -> Swaps:
    """What ``dispatch`` has for stored weights and bases, and Liger's kernels, which move bytes too."""

    def dequantize(q, scale, dtype=torch.float32):
        meter.kernel(q.nbytes + scale.nbytes + q.numel() * dtype.itemsize)
        return q.new_empty(q.shape, dtype=dtype)

    def decode(codes, scale, dim, fmt, dtype=torch.float32):
        meter.kernel(codes.nbytes + codes.shape[0] * dim * dtype.itemsize)
        return codes.new_empty((codes.shape[0], dim), dtype=dtype)

    def merge(weight, scale, delta, left, right, **how):
        rank = delta.shape[1] if left is None else delta.shape[0]
        if left is not None or right is not None:
            meter.here.merge += 2.0 * weight.numel() * rank
        row = scale is not None and scale.shape[1] == 1
        meter.kernel(2 * weight.nbytes + delta.nbytes + (8 * weight.numel() if row else 0), 2 if row else 1)

    def write_back(weight, scale, update, **how):
        meter.kernel(2 * weight.nbytes + 4 * weight.numel())

    def fused(read, written):
        meter.here.moved += _bytes([*read, *written])
        meter.here.launches += 1

    found = {"dequantize": dequantize, "decode": decode, "merge": merge, "write_back": write_back}
    return [*((dispatch, name, kernel) for name, kernel in found.items()), (liger, "launch_on_paper", fused)]


def _arithmetic(meter: _Meter) -> Swaps:
    """Products of integers, with the rounding of their tokens, and attention."""

    def round_tokens(values, scale=None):
        # Read once, for the second time is from the cache, and written in one byte.
        meter.kernel(values.numel() * (values.itemsize + 1))
        return values.new_empty(values.shape, dtype=torch.int8), values.new_empty((len(values), 1))

    def product(rounded, q):
        # What it reads and writes goes on beside its arithmetic, as in a product in bf16, where it is not counted.
        meter.here.integers += 2.0 * len(rounded) * q.numel()
        meter.kernel(0)

    def output(x, q, scale, bias=None):
        product(int8_products.round_once(x)[0], q)
        return x.new_empty((*x.shape[:-1], q.shape[0]))

    def input_gradient(grad, q, scale, dtype):
        product(round_tokens(grad.reshape(-1, grad.shape[-1]), scale)[0], q)
        return grad.new_empty((*grad.shape[:-1], q.shape[1]), dtype=dtype)

    stand_in = nn.functional.scaled_dot_product_attention

    def attention(query, key, value, attn_mask=None, **options):
        # Two products, of which a causal call computes a half. With a mask a kernel computes all of them.
        masked = attn_mask is not None and any(attn_mask.stride())
        work = (4.0 if masked else 2.0) * query.numel() * key.shape[-2]
        meter.here.attention += work
        meter.later += _BACKWARD * work
        meter.here.launches += 1
        return stand_in(query, key, value, attn_mask, **options)

    found = {"output": output, "round_tokens": round_tokens, "input_gradient": input_gradient}
    products = [(int8_products, name, kernel) for name, kernel in found.items()]
    return [*products, (nn.functional, "scaled_dot_product_attention", attention)]


def _listen(model: nn.Module, tensors: list[TrainedTensor]) -> None:
    """An ordinary step: no basis is due, and products of integers are as they were chosen."""
    for tensor in tensors:
        tensor.listen(tensor.keeps_whole)
    for module in model.modules():
        if isinstance(module, LowRankLinear) and module.products is not None:
            for choice in (module.products.output, module.products.gradient):
                choice.int8, choice.due = True, False


def count(
    model: nn.Module,
    tensors: list[TrainedTensor],
    blocks: list[nn.Module],
    loss: Callable[[nn.Module, dict[str, Tensor]], Tensor],
    batch: dict[str, Tensor],
    *,
    micro_batches: int,
    recomputed: bool,
    stand_in: AbstractContextManager,
) -> Counts:
    """The counts of one layer-major step of ``micro_batches`` like ``batch``. Model, tensors and batch are on the meta
    device, as the memory plan has them; ``recomputed``: whether blocks run again in the backward pass.
    ``stand_in``: lets attention run without values."""
    _listen(model, tensors)
    meter = _Meter()
    with stand_in, int8.planned_for("cuda"), _kernels_counted(meter):
        with meter, _through(meter, blocks) as forward:
            value = loss(model, batch)
            value.backward()
        meter.here.attention += meter.later
        passes, meter.here = meter.here, Counts()
        for tensor in tensors:
            if tensor.gradient() is not None:
                meter.here = meter.here + _step(tensor)
        update = meter.here
    # One read for each block, the prologue and the epilogue; the losses; and the norm that is logged.
    update.waits += len(blocks) + 4
    again = sum((block + spared * -1.0 for block, spared in forward), Counts())
    return passes * micro_batches + again * (micro_batches if recomputed else 0) + update


def count_forward(
    model: nn.Module,
    tensors: list[TrainedTensor],
    blocks: list[nn.Module],
    loss: Callable[[nn.Module, dict[str, Tensor]], Tensor],
    batch: dict[str, Tensor],
    *,
    stand_in: AbstractContextManager,
) -> Counts:
    """The counts of the way forward through the blocks with ``batch``. See :func:`count`."""
    _listen(model, tensors)
    meter = _Meter()
    with stand_in, int8.planned_for("cuda"), _kernels_counted(meter), meter, _through(meter, blocks) as forward:
        loss(model, batch)
    return sum((block for block, _ in forward), Counts())


@contextmanager
def _through(meter: _Meter, blocks: list[nn.Module]) -> Iterator[list[tuple[Counts, Counts]]]:
    """Inside, every block that runs adds what it takes to the list, and what of it is spared when it runs again: its
    unread products."""
    found: list[tuple[Counts, Counts]] = []
    taken: dict[nn.Module, Counts] = {}

    def enter(module: nn.Module, _: tuple) -> None:
        taken[module] = meter.here * -1.0

    def leave(module: nn.Module, _: tuple, output: Any) -> None:
        taken[module] = taken[module] + meter.here
        if module in made:
            first = output if isinstance(output, Tensor) else output[0]
            spared = [taken[layer] for layer in unread(module, made[module], first, ())]
            found.append((taken[module], sum(spared, Counts())))

    with ExitStack() as inside:
        made = {block: inside.enter_context(noted_outputs(block)) for block in blocks}
        layers = [m for block in blocks for m in block.modules() if isinstance(m, LowRankLinear)]
        handles = [module.register_forward_pre_hook(enter) for module in (*blocks, *layers)]
        handles += [module.register_forward_hook(leave) for module in (*blocks, *layers)]
        yield found
        for handle in handles:
            handle.remove()


def _step(tensor: TrainedTensor) -> Counts:
    """A tensor's step: it is looked at, its moments step every part, and it is written back."""
    gradient = tensor.gradient()
    assert gradient is not None, f"{tensor.name} has no gradient"
    look = Counts(moved=_bytes(gradient), launches=2)
    meter = _Meter()
    with _kernels_counted(meter), meter:
        tensor.step(1.0, 1.0, 0.0, (0, 0))
    adam = Counts()
    for part in tensor.parts:
        size = part.leaf.numel()
        adam += Counts(moved=size * _ADAM_BYTES, launches=1 if size >= _SMALL else 6)
    tensor.drop_gradient()
    return look + meter.here + adam
