"""A checkpoint's model as views of its memory-mapped file, for what reads it and never writes into it.

A process then holds the tensor that it works on. Of the file the system keeps in its page cache what was read last, and
drops that when memory is short. The mapping is read-only and shared, so that the file may be larger than memory and
swap together. The safetensors library maps a file for writing, which the system refuses for one of that size.
"""

import mmap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .filling import fitting, usable
from .headers import entries


def map_model(folder: Path, model: nn.Module) -> None:
    """Let the tensors of ``model`` that a checkpoint stores be views of its files; they may lie on the meta device. All
    other tensors stay as they are. Writing into a view ends the process with a segmentation fault.

    Raises as :func:`.filling.load_model`.
    """
    with usable(folder):
        views: dict[int, Any] = {}  # a parameter for a parameter, a buffer for a buffer
        for mine, value in fitting(folder, model, _views):
            is_parameter = isinstance(mine, nn.Parameter)
            views[id(mine)] = nn.Parameter(value, mine.requires_grad) if is_parameter else value
        for module in model.modules():
            tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for table in tables:
                table.update({key: views[id(tensor)] for key, tensor in table.items() if id(tensor) in views})


def _views(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a safetensors file by name, each a view of its bytes. Raises ``OSError``, ``ValueError``."""
    found = entries(path)
    with path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    for name, entry in found.items():
        if entry.dtype is None:
            raise ValueError(f"{name} has values of type {entry.kind}, which this program does not read")
        count = torch.Size(entry.shape).numel()
        value = torch.empty(0, dtype=entry.dtype, device="cpu")
        if count:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The given buffer is not writable")  # and nothing writes
                value = torch.frombuffer(memory, dtype=entry.dtype, count=count, offset=entry.begin)
        # PyTorch promises nothing for values that lie across their own alignment.
        value = value.clone() if entry.begin % entry.dtype.itemsize else value
        yield name, value.view(entry.shape)
