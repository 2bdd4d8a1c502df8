"""Triton's launches, recorded at the one door through which they all go, and held against the forms that are known."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
from torch import Tensor

from qgalore.replacing import replaced

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("an interpreted kernel is not launched on a GPU", allow_module_level=True)
pytest.importorskip("triton")
import kernel_forms
from triton.runtime.jit import JITFunction

KINDS = {"int8": "*i8", "uint8": "*u8", "bfloat16": "*bf16", "float32": "*fp32"}
ASIDE = ("enable_fp_fusion", "num_ctas")


@contextmanager
def launches_recorded(device: Any) -> Iterator[None]:
    """Inside, a kernel that is launched is noted in ``device`` and writes nothing. Raises ``AssertionError`` if it is
    given tensors that no GPU could read so."""

    def run(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        given = dict(zip(self.arg_names, args, strict=False)) | {n: v for n, v in kwargs.items() if n in self.arg_names}
        for name, value in given.items():
            if isinstance(value, Tensor):
                assert value.device.type == "cuda", f"{self.__name__} is given {name} on {value.device}"
                assert value.is_contiguous(), f"{self.__name__} is given {name} with strides {value.stride()}"
        assert all(side > 0 for side in grid), f"{self.__name__} is launched on a grid of {grid}"
        options = {n: v for n, v in kwargs.items() if n not in self.arg_names and n not in ASIDE}
        device.account.launches += 1
        device.account.kernels[self.__name__] += 1
        if self.fn.__module__.startswith("qgalore."):  # the forms of others' kernels are theirs to test
            device.launched.add(_launch(self.__name__, given, options))

    with replaced([(JITFunction, "run", run)]):
        yield


@dataclass(frozen=True)
class Launch:
    """A kernel, the types of the tensors that it was given, its constants and its options. No tensor is held."""

    kernel: str
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, Any], ...]


def _launch(kernel: str, given: dict[str, Any], options: dict[str, Any]) -> Launch:
    # What a kernel does not read in a form stands there twice, as another argument.
    first: dict[int, str] = {}
    for name, value in given.items():
        first.setdefault(id(value), name)
    types = tuple((n, _kind(v)) for n, v in given.items() if isinstance(v, Tensor) and first[id(v)] == n)
    constants = tuple((n, v) for n, v in given.items() if n in _constants())
    return Launch(kernel, types, constants, tuple(sorted(options.items())))


def _kind(tensor: Tensor) -> str:
    return KINDS.get(str(tensor.dtype).removeprefix("torch."), str(tensor.dtype))


@cache
def _forms(capability: int) -> list[Any]:
    return kernel_forms.forms(capability)


@cache
def _constants() -> frozenset[str]:
    return frozenset(name for form in _forms(89) for name in form.constants)


def unknown_forms(launched: Iterable[Launch], capability: int) -> list[Launch]:
    """Those of ``launched`` whose form is not among the ones that tests compile ahead of time (``kernel_forms``)."""
    return [launch for launch in launched if not any(_is_of(launch, form) for form in _forms(capability))]


def _is_of(launch: Launch, form: Any) -> bool:
    types, constants = {**kernel_forms._TYPES, **form.types}, dict(launch.constants)
    return (
        (form.kernel.__name__, form.options) == (launch.kernel, dict(launch.options))
        and all(types.get(name) == kind for name, kind in launch.types)
        and all(_fits(name, constants.get(name), value) for name, value in form.constants.items())
    )


def _fits(name: str, given: Any, compiled: Any) -> bool:
    """A group may be a whole row, of any length: one length stands for all."""
    return given == compiled or (name == "group" and min(given, compiled) > 128)
