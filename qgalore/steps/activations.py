"""Where the tensors wait that a walk needs again: the blocks' inputs, and the gradients that go down through them.

One interface for all. ``put(block, number, tensor)`` keeps a tensor of a micro-batch. ``get(block, number, ...)`` gives
it back on the device, drops it with ``drop``, and begins to fetch the key ``ahead``, which will be asked for next.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .blocks import Call

Key = tuple[int, int]
PARKED_BYTES = 1 << 16  # smaller arguments stay on the device: a copy would cost more than their memory


class Store(Protocol):
    """See the module."""

    def put(self, block: int, number: int, tensor: Tensor) -> None: ...

    def get(self, block: int, number: int, *, drop: bool = True, ahead: Key | None = None) -> Tensor: ...

    def clear(self) -> None: ...


def host_buffer(tensor: Tensor) -> Tensor:
    """Memory on the host for the values of ``tensor``, page-locked if it is a GPU's; of a plan's tensor, memory without
    values."""
    if tensor.is_meta:
        return torch.empty_like(tensor)
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)


class OnDevice:
    """The tensors stay where they are."""

    def __init__(self) -> None:
        self._kept: dict[Key, Tensor] = {}

    def put(self, block: int, number: int, tensor: Tensor) -> None:
        self._kept[block, number] = tensor

    def get(self, block: int, number: int, *, drop: bool = True, ahead: Key | None = None) -> Tensor:
        return self._kept.pop((block, number)) if drop else self._kept[block, number]

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()


class OnHost:
    """The tensors wait in host memory, page-locked for a CUDA device, and come back one key ahead.

    All copies of a CUDA device go through one stream of its own, in the order in which they are asked for. A buffer in
    host memory is used again in later steps. The newest tensor also stays on the device until the next one comes:
    with one micro-batch the next block asks for it at once. ``host_bytes`` is what the buffers hold.
    """

    def __init__(self) -> None:
        self.host_bytes = 0
        self._kept: dict[Key, tuple[Tensor, torch.device]] = {}
        self._free: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}
        self._coming: dict[Key, tuple[Tensor, Any]] = {}
        self._newest: tuple[Key, Tensor] | None = None
        self._streams: dict[torch.device, Any] = {}

    def put(self, block: int, number: int, tensor: Tensor) -> None:
        if (block, number) in self._kept:
            self._coming.pop((block, number), None)
            self._release((block, number))
        tensor = tensor.contiguous()
        buffer = self._buffer(tensor)
        if tensor.is_cuda:
            stream = self._stream(tensor.device)
            stream.wait_stream(torch.cuda.current_stream(tensor.device))
            with torch.cuda.stream(stream):
                buffer.copy_(tensor, non_blocking=True)
            tensor.record_stream(stream)
        else:
            buffer.copy_(tensor)
        self._kept[block, number] = buffer, tensor.device
        self._newest = (block, number), tensor

    def get(self, block: int, number: int, *, drop: bool = True, ahead: Key | None = None) -> Tensor:
        key = block, number
        if self._newest is not None and self._newest[0] == key:
            tensor = self._newest[1]
        else:
            tensor, event = self._coming.pop(key, None) or self._fetch(key)
            if event is not None:
                torch.cuda.current_stream(tensor.device).wait_event(event)
        if drop:
            self._release(key)
        if ahead in self._kept and ahead not in self._coming and (self._newest is None or self._newest[0] != ahead):
            self._coming[ahead] = self._fetch(ahead)
        return tensor

    def clear(self) -> None:
        """Forget the tensors; the buffers stay for the next step."""
        for key in list(self._kept):
            self._release(key)
        self._coming.clear()
        self._newest = None

    def _release(self, key: Key) -> None:
        buffer, _ = self._kept.pop(key)
        # a later copy into the buffer follows this one's copies on the same stream
        self._free.setdefault((buffer.shape, buffer.dtype), []).append(buffer)
        if self._newest is not None and self._newest[0] == key:
            self._newest = None

    def _buffer(self, tensor: Tensor) -> Tensor:
        free = self._free.get((tensor.shape, tensor.dtype))
        if free:
            return free.pop()
        self.host_bytes += tensor.nbytes
        return host_buffer(tensor)

    def _stream(self, device: torch.device) -> Any:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    def _fetch(self, key: Key) -> tuple[Tensor, Any]:
        buffer, device = self._kept[key]
        tensor = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
        if device.type != "cuda":
            return tensor.copy_(buffer), None
        stream = self._stream(device)
        # the memory may have been another tensor's, which kernels in the queue still read
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            tensor.copy_(buffer, non_blocking=True)
        tensor.record_stream(stream)
        return tensor, stream.record_event()


class KeptGraphs:
    """The graphs of the ``last`` blocks, kept from the forward pass: what ``put`` is given is more than a tensor, and
    ``get`` drops it. Those blocks are not run again, for the memory of all their activations of all micro-batches."""

    def __init__(self, last: int = 0) -> None:
        self.last = last
        self._kept: dict[Key, Any] = {}

    def keeps(self, block: int, blocks: int) -> bool:
        """Whether ``block`` of so many ``blocks`` keeps its graph."""
        return block >= blocks - self.last

    def put(self, block: int, number: int, graph: Any) -> None:
        self._kept[block, number] = graph

    def get(self, block: int, number: int) -> Any:
        return self._kept.pop((block, number))

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()


@dataclass(frozen=True)
class _Parked:
    """In the place of an argument that waits in a store, under this number."""

    index: int


class Arguments:
    """The blocks' further arguments (masks, rotary tables), of several micro-batches on the host if ``store`` is there.

    Those of one micro-batch are mostly the same tensors in all of its calls, and are kept once.
    """

    def __init__(self, store: Store | None) -> None:
        self.store = store
        self._calls: dict[int, list[Call]] = {}

    def put(self, number: int, calls: list[Call]) -> None:
        """Keep the calls of a micro-batch. A leaf, which waits for a gradient, stays where it is."""
        parked: dict[int, tuple[_Parked, Tensor]] = {}

        def park(tensor: Tensor) -> Any:
            if self.store is None or tensor.requires_grad or tensor.nbytes < PARKED_BYTES:
                return tensor
            if id(tensor) not in parked:
                parked[id(tensor)] = _Parked(len(parked)), tensor
                self.store.put(len(parked) - 1, number, tensor)
            return parked[id(tensor)][0]

        self._calls[number] = [call.replaced(park) for call in calls]

    def get(self, block: int, number: int) -> Call:
        """The call of ``block``. The next micro-batch's tensors begin to come, since it is likely to be next."""
        ahead, found, store = (number + 1) % len(self._calls), {}, self.store

        def fetch(parked: _Parked) -> Tensor:
            assert store is not None, "an argument is parked without a store"
            index = parked.index
            if index not in found:
                found[index] = store.get(index, number, drop=False, ahead=(index, ahead))
            return found[index]

        return self._calls[number][block].replaced(fetch, _Parked)

    def clear(self) -> None:
        """Forget everything."""
        self._calls.clear()
        if self.store is not None:
            self.store.clear()


class Activations:
    """What a walk keeps between its two passes: the blocks' ``inputs``, ``gradients`` of these, further ``arguments``,
    and ``graphs``."""

    def __init__(self, *, where: str = "device", graphs_of_last: int = 0) -> None:
        """``where``: ``device`` or ``host``, for all but graphs."""
        kinds = {"device": OnDevice, "host": OnHost}
        if where not in kinds:
            raise ValueError(f"activations are kept on {where!r}; choose device or host")
        self.where = where
        self.inputs: Store = kinds[where]()
        self.gradients: Store = kinds[where]()
        self.arguments = Arguments(kinds[where]() if where == "host" else None)
        self.graphs = KeptGraphs(graphs_of_last)

    @property
    def host_bytes(self) -> int:
        """What the buffers in host memory hold."""
        stores = (self.inputs, self.gradients, self.arguments.store)
        return sum(store.host_bytes for store in stores if isinstance(store, OnHost))

    def clear(self) -> None:
        """Forget everything, after a step that was broken off."""
        for store in (self.inputs, self.gradients, self.arguments, self.graphs):
            store.clear()
