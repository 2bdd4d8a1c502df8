"""A block's record: all that belongs to it in one contiguous buffer, as it travels between host and device.

    | bases | weights | state |

The forward direction needs the weights, the backward direction everything. What a step changes are weights and state,
and the bases in a step that refreshes one. So every copy is one range of the buffer.
"""

import mmap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...lowrank.layers.bases import Basis
from ...lowrank.layers.linear import LowRankLinear
from ...lowrank.tensors.base import SHARED_STATE, STEPS_ON, Part, TrainedTensor
from ...lowrank.tensors.states import made_by_a_step

GROUPS = ("bases", "weights", "state")
CHANGED = GROUPS[1:]  # by every step
ALIGNMENT = 256  # bytes; what CUDA's allocator gives, and more than any kernel asks for


@dataclass
class Field:
    """A tensor of a block. ``find()`` gives the present one: an optimizer may make a new one in every step, or have
    none yet. ``first`` is its first byte in the record."""

    name: str
    group: str
    shape: torch.Size
    dtype: torch.dtype
    find: Callable[[], Tensor | None]
    first: int = 0

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def view(self, memory: Tensor) -> Tensor:
        """This tensor inside a buffer of bytes that is laid out as the record."""
        return memory[self.first : self.first + self.nbytes].view(self.dtype).view(self.shape)


@dataclass
class Record:
    """The ``fields`` of a block, laid out. ``ranges``: first byte and end of each of :data:`GROUPS`. ``memory``: the
    bytes in host memory, None on paper."""

    fields: list[Field]
    ranges: dict[str, tuple[int, int]] = field(default_factory=dict)
    memory: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """All of it."""
        return self.ranges["state"][1]

    def spans(self, groups: Sequence[str]) -> list[tuple[int, int]]:
        """The ranges of ``groups``, neighbours as one; empty ones are left out."""
        found: list[tuple[int, int]] = []
        for group in GROUPS:
            a, b = self.ranges[group]
            if group not in groups or a == b:
                continue
            if found and found[-1][1] == a:
                found[-1] = found[-1][0], b
            else:
                found.append((a, b))
        return found

    def size(self, groups: Sequence[str]) -> int:
        """Bytes of ``groups``."""
        return sum(b - a for a, b in self.spans(groups))


def lay_out(fields: Iterable[Field]) -> Record:
    """A record of ``fields``, on paper; each gets its place."""
    record, end = Record(list(fields)), 0
    for group in GROUPS:
        start = end
        for entry in (entry for entry in record.fields if entry.group == group):
            entry.first = end
            end += -(-entry.nbytes // ALIGNMENT) * ALIGNMENT
        record.ranges[group] = start, end
    return record


def host_memory(nbytes: int) -> Tensor:
    """So many bytes of zeros in whole pages of their own, none of which is real before it is written."""
    return torch.frombuffer(mmap.mmap(-1, max(nbytes, 1)), dtype=torch.uint8)[:nbytes]


@torch.no_grad()
def gather(record: Record, device: torch.device, copy: bool = True) -> None:
    """Give ``record`` memory and make its tensors views of it, with their values if ``copy``. A parameter that has a
    gradient of its own will step on ``device``."""
    record.memory = host_memory(record.nbytes)
    for entry in record.fields:
        tensor = entry.find()
        if tensor is None:
            continue
        place = entry.view(record.memory)
        if copy:
            place.copy_(tensor)
        tensor.data = place
        if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
            setattr(tensor, STEPS_ON, device)


def used_elsewhere(model: nn.Module, blocks: Sequence[nn.Module]) -> set[int]:
    """The identities of tensors that several of ``blocks`` use, or one of them and the rest of ``model``."""
    inside = {id(module) for block in blocks for module in block.modules()}
    rest = [module for module in model.modules() if id(module) not in inside]
    found: set[int] = set()
    seen = {id(tensor) for module in rest for tensor in _own_tensors(module)}
    for block in blocks:
        own = {id(tensor) for module in block.modules() for tensor in _own_tensors(module)}
        found |= own & seen
        seen |= own
    return found


def _own_tensors(module: nn.Module) -> list[Tensor]:
    return [t for table in (module._parameters, module._buffers) for t in table.values() if t is not None]


def fields_of_block(block: nn.Module, elsewhere: set[int]) -> list[Field]:
    """The parameters and buffers of ``block``. Left out are zero leaves, single values, and tensors whose identity is
    in ``elsewhere``, because other parts of the model use them too."""
    seen, found = set(elsewhere), []
    for layer in block.modules():
        if isinstance(layer, LowRankLinear):
            seen |= {id(leaf) for leaf in layer.leaves().values()}
    for path, module in block.named_modules():
        group = "bases" if isinstance(module, Basis) else "weights"
        for table in (module._parameters, module._buffers):
            for key, tensor in table.items():
                if tensor is None or tensor.ndim == 0 or tensor.numel() == 0 or id(tensor) in seen:
                    continue
                seen.add(id(tensor))
                name = f"{path}.{key}" if path else key
                found.append(Field(name, group, tensor.shape, tensor.dtype, partial(table.get, key)))
    return found


def fields_of_state(tensors: Iterable[TrainedTensor], known: dict[Any, dict[str, Any]]) -> list[Field]:
    """What the optimizer keeps for ``tensors``: masters, a rule's own state, the inner optimizer's. The last is known
    from trying a step for each size, which ``known`` collects. Single values stay where they are."""
    found = []
    for tensor in tensors:
        for name, value in tensor.tensors().items():
            if value.ndim:
                find = partial(_own, tensor, name)
                found.append(Field(f"{tensor.name}|{name}", "state", value.shape, value.dtype, find))
        for number, part in enumerate(tensor.parts):
            if not part.leaf.numel():  # of a rule without moments
                continue
            key = type(part.inner), part.leaf.shape
            if key not in known:
                known[key] = made_by_a_step(part)
            for name, value in known[key].items():
                if torch.is_tensor(value) and value.ndim and not name.startswith(SHARED_STATE):
                    label = f"{tensor.name}|{number}|{name}"
                    found.append(Field(label, "state", value.shape, value.dtype, partial(_inner, part, name)))
    return found


def _own(tensor: TrainedTensor, name: str) -> Tensor | None:
    return tensor.tensors().get(name)


def _inner(part: Part, name: str) -> Tensor | None:
    return part.inner.state.get(part.leaf, {}).get(name)
