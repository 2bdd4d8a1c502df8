"""What a run keeps between steps, byte by byte, from a converted model on the meta device."""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor, nn

from ..lowrank.layers.bases import Basis
from ..lowrank.layers.linear import LowRankLinear
from ..lowrank.tensors.base import TrainedTensor
from ..lowrank.tensors.splitting import places_in
from ..parallel.shards import share

KINDS = ("int8 weights", "weight scales", "bases", "trained in full", "moments", "fp32 masters", "buffers")


def resident(model: nn.Module, tensors: Sequence[TrainedTensor], streamed: Collection[int] = ()) -> dict[str, int]:
    """Bytes by category of all that is kept between steps, for a ``model`` and its ``tensors``, which are attached.
    ``streamed``: identities of storages that are elsewhere. Where owners keep moments, ranks that are free count as
    large as they may become: their budget is one for all processes, and the layers of one of them may take most."""
    for tensor in tensors:
        if tensor.adaptive and tensor.owner is not None:
            tensor.fill()
    make_states(tensors)
    sizes = _model_bytes(model, streamed)
    for tensor in (tensor for tensor in tensors if tensor.shards > 1):
        if tensor.module is None:
            sizes["trained in full"] -= tensor.stored.nbytes - share(tensor.stored, 0, tensor.shards).nbytes
            continue
        for place in places_in(tensor.module):
            if place.tensor.untyped_storage()._cdata not in streamed:
                others = place.nbytes - place.share(tensor.shards).nbytes
                sizes[_category(place.module, place.key, place.tensor)] -= others
    of_rules = [tensor for tensor in tensors if tensor.keeps_whole]
    sizes["moments"] = state_bytes(tensors, streamed) + _extra_bytes(of_rules, streamed)
    masters = [tensor for tensor in tensors if tensor not in of_rules]
    sizes["fp32 masters"] = _extra_bytes(masters, streamed)
    return {name: sizes[name] for name in KINDS}


def make_states(tensors: Sequence[TrainedTensor]) -> None:
    """Let the inner optimizers make their states, if they have none yet."""
    for part in (part for tensor in tensors if not tensor.elsewhere for part in tensor.parts):
        if part.leaf.numel():  # a rule without moments never steps its own
            part.step(torch.zeros_like(part.leaf), 0.0)  # for the inner optimizers to make their states
        part.scratch.release()


def tensors_kept(model: nn.Module, tensors: Sequence[TrainedTensor]) -> Iterator[Tensor]:
    """All tensors that are there between steps, and the leaves that the inner optimizers step."""
    yield from (*model.parameters(), *model.buffers())
    for tensor in tensors:
        yield from tensor.tensors().values()
        for part in tensor.parts:
            yield part.leaf
            yield from (value for value in part.state().values() if torch.is_tensor(value))


def state_bytes(tensors: Sequence[TrainedTensor], streamed: Collection[int] = ()) -> int:
    """Bytes of all that the inner optimizers of ``tensors`` keep, shared ones once, without ``streamed`` storages."""
    sizes = {}
    for part in (part for tensor in tensors for part in tensor.parts):
        for value in part.state().values():
            if torch.is_tensor(value):
                sizes[value.untyped_storage()._cdata] = value.untyped_storage().nbytes()
    return sum(size for storage, size in sizes.items() if storage not in streamed)


def _extra_bytes(tensors: Sequence[TrainedTensor], streamed: Collection[int]) -> int:
    """Bytes of what ``tensors`` keep beside the model's tensors and the inner optimizers'."""
    mine = (tensor for tensor in tensors if not tensor.elsewhere)
    storages = (value.untyped_storage() for tensor in mine for value in tensor.tensors().values())
    return sum(storage.nbytes() for storage in storages if storage._cdata not in streamed)


def _model_bytes(model: nn.Module, streamed: Collection[int]) -> Counter[str]:
    """Bytes of a converted model's own tensors by category, shared ones once."""
    sizes: Counter[str] = Counter()
    seen: set[int] = set()
    for module in model.modules():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                if tensor.untyped_storage()._cdata in streamed:
                    continue
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
