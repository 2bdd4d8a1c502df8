"""A CUDA device that is not there: tensors without values that say they are on it, and a driver without a card.

What reaches the driver itself (streams, events, generators, page locks) is replaced here and nowhere else.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from pretended_device import (
    CAPABILITY,
    DEVICE,
    Device,
    Generator,
    RefusedByCudaError,
    asking,
    kinds_of_generators,
    storage_of,
)
from recorded import launches_recorded
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers.utils import import_utils

from qgalore.quant import dispatch
from qgalore.replacing import replaced


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
    frame = asking()
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
        (torch.cuda, "device", _on),
        (torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(multi_processor_count=34)),
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
        "data_ptr": lambda self: (storage_of(self) << 40) + self.storage_offset() * self.element_size(),
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
        stack.callback(kinds_of_generators.clear)
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
