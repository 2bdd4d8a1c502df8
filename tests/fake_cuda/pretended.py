"""A CUDA device that is not there: tensors without values that say they are on it, and an account of what is asked.

PyTorch's ``FakeTensorMode`` refuses an operation whose operands lie on different devices. Around it this module counts
launches, synchronisations and copies, answers where a program reads a value, and raises what a GPU would raise.
What reaches the driver itself (streams, events, generators, page locks) is replaced here and nowhere else.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import bitsandbytes.functional  # noqa: F401 - which looks for a GPU when it is first imported
import numpy as np
import torch
from recorded import Launch, launches_recorded
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.utils import import_utils

from qgalore.quant import dispatch
from qgalore.replacing import replaced

DEVICE = torch.device("cuda", 0)
CAPABILITY = (8, 9)
NO_WORK = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "lift_fresh", "alias"}
READS = {"nonzero", "masked_select", "unique2", "_unique2", "unique_dim", "is_nonzero"}
# torch.linalg reads back whether a decomposition has converged. QR has nothing to read.
CHECKED = {"_linalg_eigh", "linalg_eig", "_linalg_svd", "linalg_cholesky_ex", "linalg_inv_ex", "_linalg_solve_ex"}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot"}
FLOATS = {torch.float32, torch.float64, torch.bfloat16, torch.float16}
# A program asks, and is told what lets it go on. Elsewhere the answers are True and 1: a loss of 1 is finite.
ANSWERS = {
    "find_packed_sequence_indices": [False],  # the rows are packed
    "check_coded": [0.0],  # lowrank.inner.checked: how far an 8-bit Adam is from a whole one
    "settle": [0.01],  # lowrank.layers.product_choice: how far a product of integers is from a whole one
    "difference": [0.0, 1.0],  # models.loss: a document hides from the next one exactly where it should
}


class RefusedByCudaError(RuntimeError):
    """What a GPU would refuse."""


@dataclass
class Account:
    """What was asked of the device. ``waits``: why the host waited, and the line that made it."""

    launches: int = 0
    operations: Counter = field(default_factory=Counter)
    kernels: Counter = field(default_factory=Counter)
    waits: Counter = field(default_factory=Counter)
    to_device: int = 0
    to_host: int = 0
    pageable: Counter = field(default_factory=Counter)  # copies that were to run beside the rest and cannot

    def figures(self) -> dict[str, int]:
        """What a budget holds."""
        return {
            "launches": self.launches,
            "waits": self.waits.total(),
            "bytes to the device": self.to_device,
            "bytes to the host": self.to_host,
        }


def _asking() -> Any:
    """The innermost frame of a model or of the product; None if there is none."""
    frame: Any = sys._getframe(1)
    while frame is not None and not frame.f_globals.get("__name__", "").startswith(("qgalore.", "transformers.")):
        frame = frame.f_back
    return frame


def _place() -> str:
    """Who is asking, as module:line."""
    frame = _asking()
    return "elsewhere" if frame is None else f"{frame.f_globals['__name__']}:{frame.f_lineno}"


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values.values() if isinstance(values, dict) else values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Mode(FakeTensorMode):
    avoid_device_init = True  # whatever ``is_available`` says here

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if not self.in_kernel_invocation and torch.device(kwargs.get("device") or "cpu").type == "meta":
            # C++ took a tensor's own device: for a number, or for something as large as the tensors around it.
            kwargs["device"] = torch.device("cpu") if func._schema.name == "aten::scalar_tensor" else DEVICE
        return super().__torch_dispatch__(func, types, args, kwargs)


class Device(TorchDispatchMode):
    """Sees every operation on fake tensors, before ``FakeTensorMode`` does."""

    def __init__(self) -> None:
        super().__init__()
        self.account = Account()
        self.mode = _Mode(allow_non_fake_inputs=True)
        self.pinned: list[tuple[Any, int]] = []  # storages of page-locked memory, held so that no other has their place
        self.launched: set[Launch] = set()
        self._asked: Counter = Counter()

    # What a program reads.

    def answer(self, kind: torch.dtype) -> Any:
        """The next answer for whoever asks."""
        frame = _asking()
        name = "" if frame is None else frame.f_code.co_name
        if name in ANSWERS:
            given = ANSWERS[name]
            self._asked[name] += 1
            return given[(self._asked[name] - 1) % len(given)]
        return True if kind is torch.bool else 1.0 if kind.is_floating_point else 1

    def wait(self, why: str) -> None:
        self.account.waits[f"{why} at {_place()}"] += 1

    # Operations.

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = func._schema.name.split("::")[1]
        given = list(_tensors((*args, *kwargs.values())))
        there = any(tensor.device.type == "cuda" for tensor in given)
        if name == "_local_scalar_dense":
            return self._read(args[0])
        if name in ("equal", "allclose"):
            if there:
                self.wait(f"torch.{name}")
            return True
        if name == "bincount" and there:
            for value in ("smallest", "largest"):
                self.wait(f"the {value} value of torch.bincount")
            return args[0].new_zeros(kwargs["minlength"])
        if kwargs.pop("pin_memory", None):
            made = func(*args, **kwargs)
            self.pinned.append((made.untyped_storage(), _storage(made)))
            return made
        self._check_generator(name, given, kwargs)
        if there:
            self._check_dtypes(name, args)
            if name in READS or (name in ("index", "index_put_") and self._masked(args)):
                self.wait(name)
            if name in CHECKED:
                self.wait(f"{name}'s convergence")
        out = func(*args, **kwargs)
        made = list(_tensors(out if isinstance(out, (list, tuple)) else (out,)))
        if name in ("copy_", "_to_copy"):
            target, source = (args[0], args[1]) if name == "copy_" else (made[0], args[0])
            self._copied(target, source, bool(kwargs.get("non_blocking") or (name == "copy_" and args[2:] == (True,))))
        if there or any(tensor.device.type == "cuda" for tensor in made):
            self._launched(func, name, given, made)
        return out

    def _read(self, tensor: Tensor) -> Any:
        if tensor.device.type == "cuda":
            self.wait("a value is read")
        elif getattr(tensor, "constant", None) is not None:
            return tensor.constant.item()
        return self.answer(tensor.dtype)

    def _masked(self, args: tuple) -> bool:
        return any(t.dtype is torch.bool for t in _tensors(args[1]))

    def _check_generator(self, name: str, given: list[Tensor], kwargs: dict[str, Any]) -> None:
        if (generator := kwargs.get("generator")) is None:
            return
        place = torch.device(kwargs.get("device") or (given[0].device if given else "cpu"))
        claimed = _claimed.get(generator._cdata, "cpu")
        if place.type != claimed:
            raise RefusedByCudaError(f"{name} on {place.type} with a generator of {claimed} ({_place()})")

    def _check_dtypes(self, name: str, args: tuple) -> None:
        kinds = {t.dtype for t in _tensors(args) if t.ndim}
        if name in PRODUCTS and kinds - FLOATS:
            raise RefusedByCudaError(f"{name} has no CUDA code for {kinds - FLOATS} ({_place()})")
        half = kinds & {torch.bfloat16, torch.float16}
        if half and ("linalg" in name or name == "geqrf") and "vector_norm" not in name:
            raise RefusedByCudaError(f"{name} has no CUDA code for {half} ({_place()})")
        if name == "_int_mm":
            (tokens, length), width = args[0].shape, args[1].shape[1]
            if tokens <= 16 or length % 8 or width % 8:
                raise RefusedByCudaError(f"_int_mm of {tokens} × {length} × {width}")

    def _copied(self, target: Tensor, source: Tensor, beside: bool) -> None:
        kinds = source.device.type, target.device.type
        size = target.numel() * target.element_size()
        if kinds == ("cpu", "cuda"):
            self.account.to_device += size
        elif kinds == ("cuda", "cpu"):
            self.account.to_host += size
        else:
            return
        host = source if kinds[0] == "cpu" else target
        if host.ndim == 0 and kinds[0] == "cpu" and not beside:
            self.wait("a number is copied to the device")
        elif not beside:
            self.wait(f"a copy from {kinds[0]} to {kinds[1]}")
        elif not self.is_pinned(host):
            self.account.pageable[_place()] += 1

    def is_pinned(self, tensor: Tensor) -> bool:
        return any(_storage(tensor) == place for _, place in self.pinned)

    def _launched(self, func: Any, name: str, given: list[Tensor], made: list[Tensor]) -> None:
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
        if not writes:
            known = {_storage(tensor) for tensor in given}
            if name in NO_WORK or not made or all(_storage(tensor) in known for tensor in made):
                return
        self.account.launches += 1
        self.account.operations[name] += 1


class Generator:
    """``torch.Generator``, which notes the device that each is asked for; there is none for a GPU here."""

    def __new__(cls, device: Any = "cpu") -> Any:
        made = _own_generator()
        _claimed[made._cdata] = torch.device(device).type
        return made


_own_generator = torch.Generator
_claimed: dict[int, str] = {}  # kinds of devices by generator


class _Event:
    def synchronize(self) -> None:
        _now().wait("an event")

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...


class _Stream:
    def __init__(self, device: Any = None) -> None:
        self.device = device

    def wait_stream(self, other: "_Stream") -> None: ...

    def wait_event(self, event: _Event) -> None:
        assert isinstance(event, _Event), f"a stream is to wait for {event!r}"

    def record_event(self, event: Any = None) -> _Event:
        return _Event()

    def synchronize(self) -> None:
        _now().wait("a stream")


class _Runtime:
    """The part of CUDA's runtime that locks pages."""

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        _now().pinned.append((None, address >> 40))
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        return 0


_devices: list[Device] = []


def _now() -> Device:
    return _devices[-1]


@contextmanager
def _on(stream: Any) -> Iterator[None]:
    yield


def _make_subclass(cls, data, requires_grad=False, **how):
    """Autograd asks the driver of a tensor's device, so for its C++ these tensors are on the meta device."""
    how.pop("dispatch_device", None)
    how.pop("device_for_backend_keys", None)
    return _own_make_subclass(cls, data, requires_grad, **how)


_own_make_subclass = torch.Tensor._make_subclass
_own_data: Any = torch._C.TensorBase.data


def _to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``Tensor.to``, which C++ would compare with the meta device."""
    copy = kwargs.pop("copy", False)
    if args and isinstance(args[0], Tensor):
        args, kwargs = (args[0].device, args[0].dtype, *args[1:]), kwargs
    device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
    place = torch.device(self.device if device is None else device)
    if place.type == "cuda" and place.index is None:
        place = DEVICE
    if not copy and place == self.device and dtype in (None, self.dtype) and layout is None:
        return self
    more = {} if layout is None else {"memory_format": layout}
    return torch.ops.aten._to_copy(self, dtype=dtype, device=place, non_blocking=non_blocking, **more)


def _set_data(self: Tensor, value: Tensor) -> None:
    _own_data.__set__(self, value)
    self.fake_device = value.device


def _to_list(self: Tensor) -> Any:
    if self.device.type == "cuda":
        _now().wait("a list of values is read")
    frame = _asking()
    if frame is not None and frame.f_code.co_name == "_by_expert":  # how many rows each of a mixture's experts gets
        rows, experts = len(frame.f_locals["chosen"]), len(self)
        return [rows * (e + 1) // experts - rows * e // experts for e in range(experts)]
    answer = _now().answer(self.dtype)
    return np.full(tuple(self.shape), answer).tolist()


def _to_numpy(self: Tensor, **_: Any) -> np.ndarray:
    if self.device.type == "cuda":
        raise RefusedByCudaError("can't convert cuda:0 device type tensor to numpy")
    return np.ones(tuple(self.shape), dtype=str(self.dtype).removeprefix("torch."))


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """The kernel that a GPU would choose: flash attention without a mask, and the memory-efficient one with it."""
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    aten = torch.ops.aten
    if attn_mask is None and query.dtype in (torch.bfloat16, torch.float16):
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    bias = attn_mask
    if bias is not None:
        if bias.dtype is torch.bool:
            bias = torch.zeros_like(bias, dtype=query.dtype).masked_fill(~bias, float("-inf"))
        bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, query.requires_grad, dropout_p, is_causal, scale=scale
    )[0]


@contextmanager
def pretended(*, kernels: bool = True, capability: tuple[int, int] = CAPABILITY) -> Iterator[Device]:
    """Inside, ``cuda:0`` is there, for tensors without values. ``kernels``: Triton's are launched, and recorded."""
    device = Device()
    cuda: list[tuple[Any, str, Any]] = [
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "is_bf16_supported", lambda *_: capability >= (8, 0)),
        (torch.cuda, "get_device_capability", lambda *_: capability),
        (torch.cuda, "get_rng_state", lambda *_: None),
        (torch.cuda, "set_rng_state", lambda *_: None),
        (torch.cuda, "manual_seed_all", lambda *_: None),
        (torch.cuda, "Stream", _Stream),
        (torch.cuda, "stream", _on),
        (torch.cuda, "current_stream", _Stream),
        (torch.cuda, "cudart", _Runtime),
        (torch, "Generator", Generator),
    ]
    tensors: list[tuple[Any, str, Any]] = [
        (torch.Tensor, "_make_subclass", staticmethod(_make_subclass)),
        (nn.functional, "scaled_dot_product_attention", _attention),
        (import_utils, "is_fake_tensor", lambda _: False),  # else transformers would ask less than it does
        (dispatch, "_choice", "auto"),  # whatever this process chose before
        (dispatch, "_obstacle_on", lambda _: None if kernels else "kernels are left out here"),
    ]
    methods = {
        "is_cuda": property(lambda self: self.device.type == "cuda"),
        "is_cpu": property(lambda self: self.device.type == "cpu"),
        "is_meta": property(lambda self: self.device.type == "meta"),
        "data": property(_own_data.__get__, _set_data),
        "to": _to,
        "cpu": lambda self: _to(self, "cpu"),
        "cuda": lambda self, *_: _to(self, DEVICE),
        "tolist": _to_list,
        "numpy": _to_numpy,
        "data_ptr": lambda self: (_storage(self) << 40) + self.storage_offset() * self.element_size(),
        "record_stream": lambda self, stream: None,
        "owned_by": lambda self, layer: self,  # of a StoredWeight, which no tensor without values can become
    }
    with ExitStack() as stack:
        stack.enter_context(replaced([*cuda, *tensors]))
        stack.enter_context(_with_methods(FakeTensor, methods))
        stack.enter_context(launches_recorded(device))
        _forget_tensors()
        stack.callback(_forget_tensors)
        _devices.append(device)
        stack.callback(_devices.pop)
        stack.callback(_claimed.clear)
        yield device


def _forget_tensors() -> None:
    """Clear what the product keeps for a process: it would hold tensors of another world."""
    modules = [module for name, module in sys.modules.items() if name.startswith("qgalore.")]
    for value in [value for module in modules for value in vars(module).values()]:
        if callable(clear := getattr(value, "cache_clear", None)):
            clear()


@contextmanager
def _with_methods(cls: type, methods: dict[str, Any]) -> Iterator[None]:
    before = {name: cls.__dict__[name] for name in methods if name in cls.__dict__}
    for name, value in methods.items():
        setattr(cls, name, value)
    try:
        yield
    finally:
        for name in methods:
            delattr(cls, name)
        for name, value in before.items():
            setattr(cls, name, value)
