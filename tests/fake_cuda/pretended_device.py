"""What operations ask of a CUDA device that is not there, counted, and refused where a GPU would refuse.

PyTorch's ``FakeTensorMode`` refuses an operation whose operands lie on different devices. Around it this module counts
launches, synchronisations and copies, answers where a program reads a value, and raises what a GPU would raise.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import bitsandbytes.functional  # noqa: F401 - which looks for a GPU when it is first imported
import torch
from recorded import Launch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

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


def asking() -> Any:
    """The innermost frame of a model or of the product; None if there is none."""
    frame: Any = sys._getframe(1)
    while frame is not None and not frame.f_globals.get("__name__", "").startswith(("qgalore.", "transformers.")):
        frame = frame.f_back
    return frame


def _place() -> str:
    """Who is asking, as module:line."""
    frame = asking()
    return "elsewhere" if frame is None else f"{frame.f_globals['__name__']}:{frame.f_lineno}"


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values.values() if isinstance(values, dict) else values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def storage_of(tensor: Tensor) -> int:
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
        frame = asking()
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
            self.pinned.append((made.untyped_storage(), storage_of(made)))
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
        claimed = kinds_of_generators.get(generator._cdata, "cpu")
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
        return any(storage_of(tensor) == place for _, place in self.pinned)

    def _launched(self, func: Any, name: str, given: list[Tensor], made: list[Tensor]) -> None:
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
        if not writes:
            known = {storage_of(tensor) for tensor in given}
            if name in NO_WORK or not made or all(storage_of(tensor) in known for tensor in made):
                return
        self.account.launches += 1
        self.account.operations[name] += 1


class Generator:
    """``torch.Generator``, which notes the device that each is asked for; there is none for a GPU here."""

    def __new__(cls, device: Any = "cpu") -> Any:
        made = _own_generator()
        kinds_of_generators[made._cdata] = torch.device(device).type
        return made


_own_generator = torch.Generator
kinds_of_generators: dict[int, str] = {}  # kinds of devices
