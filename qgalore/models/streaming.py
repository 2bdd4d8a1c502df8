"""Building a model one tensor at a time, so that it never exists in full precision.

The architecture is made on the meta device, converted there, and given memory in its final formats. A *source* then
yields every tensor as a function that makes a few rows at a time: initialised as transformers would
(:func:`initialisation`), read from safetensors files (:mod:`.folder`), or copied from a model that could only be built
whole (:func:`copied`).
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from ..errors import ConfigError
from ..files.headers import as_matrix, is_finite
from ..lowrank.layers.bases import Basis
from ..lowrank.layers.experts import Experts
from ..lowrank.layers.linear import LowRankLinear
from ..parallel import shards
from .packed import Packed

Rows = Callable[[int, int], Tensor]  # of a tensor of more than two dimensions: the vectors along its last one
Source = Iterable[tuple[str, Rows | Packed]]
TILE_ELEMENTS = 1 << 22  # 16 MiB in fp32
_QUIET_ELEMENTS = 1 << 28  # smaller models are filled before a progress bar could be read
_BLOCK = 16  # PyTorch's CPU generator makes normal values in blocks of 16: tiles that respect them change nothing


class CannotStreamError(Exception):
    """The tensors of this model cannot be made one at a time; the message says why."""


def row_tiles(shape: torch.Size) -> list[tuple[int, int]]:
    """Row ranges of at most about ``TILE_ELEMENTS`` elements, each a multiple of 16 rows but the last."""
    rows = shape[0] if len(shape) else 1
    if shape.numel() <= TILE_ELEMENTS or len(shape) < 2:
        return [(0, rows)]
    step = max(1, TILE_ELEMENTS * rows // shape.numel() // _BLOCK) * _BLOCK
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


@dataclass
class _Recipe:
    """The in-place operations that initialise one tensor: (operation, its arguments, first row, rows)."""

    name: str
    shape: torch.Size
    steps: list[tuple[Any, tuple, dict, int, int]] = field(default_factory=list)

    def rows(self, a: int, b: int) -> Tensor:
        """Rows a … b−1 in fp32. Consumes PyTorch's generator: tiles must be asked for once and in order."""
        tile = torch.empty((b - a, *self.shape[1:]) if len(self.shape) else (), device="cpu")
        for operation, args, kwargs, first, count in self.steps:
            low, high = max(a, first), min(b, first + count)
            if low < high:
                operation(tile[low - a : high - a] if len(self.shape) else tile, *args, **kwargs)
        return tile


class _Recorder(TorchDispatchMode):
    """Notes the in-place operations on meta parameters instead of running them; without ``recipes`` it drops them."""

    def __init__(self, recipes: dict[int, _Recipe] | None) -> None:
        super().__init__()
        self.recipes = recipes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        target = args[0] if args else None
        if not (func._schema.is_mutable and isinstance(target, Tensor) and target.device.type == "meta"):
            return func(*args, **(kwargs or {}))
        if self.recipes is None:
            return target
        key = target.untyped_storage()._cdata
        recipe = self.recipes.get(key)
        if recipe is None or any(isinstance(value, Tensor) for value in args[1:]):
            raise CannotStreamError(f"its initialisation uses {func} in a way that cannot be done by rows")
        width = recipe.shape[1:].numel()
        first, rest = divmod(target.storage_offset(), width)
        count, surplus = divmod(target.numel(), width)
        if rest or surplus or not target.is_contiguous():
            raise CannotStreamError(f"its initialisation applies {func} to a part of a tensor that is not whole rows")
        whole = target.numel() == recipe.shape.numel()
        if whole and func.overloadpacket.__name__ in ("normal_", "uniform_", "zero_", "fill_"):
            recipe.steps.clear()
            self.recipes[key] = self.recipes.pop(key)  # random numbers are drawn in the order of initialisation
        recipe.steps.append((func, args[1:], kwargs or {}, first, count))
        return target


def initialisation(model: nn.Module, seed: int) -> Source:
    """The tensors of a transformers model on the meta device, as its own ``initialize_weights`` would make them.

    In fp32 they equal, bit for bit, those of a whole model initialised right after ``torch.manual_seed(seed)``. Buffers
    are computed at once. Raises :class:`CannotStreamError` for an initialisation that does not work on rows.
    """
    recipes = {p.untyped_storage()._cdata: _Recipe(name, as_matrix(p.shape)) for name, p in model.named_parameters()}
    with _untied(model) as extra:
        recorded = recipes | extra
        _initialise(model, recorded)
    ordered = [recipe for key, recipe in recorded.items() if key not in extra]
    if empty := [recipe.name for recipe in ordered if not recipe.steps]:
        raise CannotStreamError(f"transformers does not initialise {empty[0]}")

    def generate() -> Iterator[tuple[str, Rows]]:
        torch.manual_seed(seed)
        for recipe in ordered:
            yield recipe.name, recipe.rows

    return generate()


@contextmanager
def _untied(model: nn.Module) -> Iterator[dict[int, _Recipe]]:
    """Shared tensors apart, as transformers has them while it initialises. Gives recipes for the other places."""
    seen: set[int] = set()
    swapped = []
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in seen:
                swapped.append((module, key, parameter))
                module._parameters[key] = nn.Parameter(torch.empty_like(parameter))
            seen.add(id(parameter))
    try:
        yield {m._parameters[key].untyped_storage()._cdata: _Recipe(key, as_matrix(p.shape)) for m, key, p in swapped}
    finally:
        for module, key, parameter in swapped:
            module._parameters[key] = parameter


def compute_buffers(model: nn.Module) -> None:
    """Give the buffers of a model on the meta device their values; parameters stay as they are. Raises
    :class:`CannotStreamError` if its ``initialize_weights`` does not make them all."""
    _initialise(model, None)


def _initialise(model: nn.Module, recipes: dict[int, _Recipe] | None) -> None:
    """Run ``initialize_weights`` with real buffers and recorded parameters; ``recipes`` ends up in its order."""
    unset = []
    for name, module in model.named_modules():
        module.__dict__.pop("_is_hf_initialized", None)
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                unset_value = _unset(buffer.dtype)
                module._buffers[key] = torch.full(buffer.shape, unset_value, dtype=buffer.dtype, device="cpu")
                unset.append((f"{name}.{key}", module, key))
    with _Recorder(recipes):
        model.initialize_weights()
    for name, module, key in unset:
        buffer = module._buffers[key]
        mark = _unset(buffer.dtype)
        if buffer.dtype == torch.bool or (buffer.isnan() if mark != mark else buffer == mark).any():
            raise CannotStreamError(f"the values of its buffer {name} are not made by its initialisation")


def _unset(dtype: torch.dtype) -> float | int | bool:
    """A value that no initialisation gives a buffer, if its type has one (bool has not)."""
    if dtype == torch.bool:
        return False
    return float("nan") if dtype.is_floating_point or dtype.is_complex else torch.iinfo(dtype).min


def copied(whole: nn.Module, model: nn.Module) -> Source:
    """The tensors of ``whole``, a model built in full; its buffers are handed to ``model``, of the same class."""
    own = dict(model.named_modules())
    for name, module in whole.named_modules():
        for key, buffer in module._buffers.items():
            own[name]._buffers[key] = buffer
    tensors = {name: parameter.detach() for name, parameter in whole.named_parameters()}
    return ((name, partial(_rows_of, values)) for name, values in tensors.items())


def _rows_of(values: Tensor, a: int, b: int) -> Tensor:
    return values.view(as_matrix(values.shape))[a:b] if values.ndim else values


def allocate(model: nn.Module, device: torch.device, in_host_memory: Collection[int] = ()) -> None:
    """Give every tensor of ``model`` memory on ``device``, in place; those on the meta device are left unset (bases
    zero). Shared tensors stay shared, and Δ's and probes stay one expanded zero. ``in_host_memory``: the identities of
    tensors that do not go to the device."""
    fresh: dict[int, Tensor] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for key, tensor in table.items():
                where = torch.device("cpu") if id(tensor) in in_host_memory else device
                if tensor is not None and tensor.device != where:
                    if id(tensor) not in fresh:
                        fresh[id(tensor)] = _real(tensor, where)
                    table[key] = fresh[id(tensor)]


def _real(tensor: Tensor, device: torch.device) -> Tensor:
    if shards.is_shared(tensor):
        real = torch.zeros_like(tensor.detach(), device=device)  # which may be another one than its mesh's
    elif not tensor.is_meta:
        real = tensor.detach().to(device)
    elif tensor.ndim and tensor.numel() > 1 and not any(tensor.stride()):
        real = torch.zeros((), dtype=tensor.dtype, device=device).expand(tensor.shape)
    elif isinstance(tensor, nn.Parameter):
        real = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    else:
        real = torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
    return nn.Parameter(real, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else real


@torch.no_grad()
def fill(model: nn.Module, source: Source, report: str) -> list[str]:
    """Store every tensor of ``source`` in ``model``, converted or not, a few rows at a time; ``report`` labels the
    progress bar of a large model. Returns the names of int8 weights that were quantized anew, since ``model`` groups
    them otherwise. Raises :class:`ConfigError` for values that are not finite and for tensors that ``source`` lacks."""
    layers = [module for module in model.modules() if isinstance(module, LowRankLinear)]
    made = {id(value) for layer in layers for value in (*layer.leaves().values(), layer.weight_scale)}  # not stored
    made |= {id(value) for module in model.modules() if isinstance(module, Basis) for value in module.parameters()}
    targets = {n: p for n, p in model.named_parameters(remove_duplicate=False) if id(p) not in made}
    wanted = {id(p): p.numel() for p in targets.values()}
    total, anew = sum(wanted.values()), []
    with tqdm(total=total, desc=report, unit=" weights", unit_scale=True, disable=total < _QUIET_ELEMENTS) as bar:
        for name, given in source:
            module, _, key = name.rpartition(".")
            layer = model.get_submodule(module)
            mine = [targets[name]] if name in targets else [part.weight for part in layer.get_submodule(key)]
            rows = partial(_checked, given.rows if isinstance(given, Packed) else given)
            try:
                if isinstance(layer, Experts):
                    for a, b in row_tiles(torch.Size((sum(p.shape[0] for p in mine), mine[0].shape[1]))):
                        layer.store(key, a, rows(a, b))
                elif key == "weight" and isinstance(layer, LowRankLinear):
                    if not (isinstance(given, Packed) and _take_integers(layer, given)):
                        _fill_layer(layer, rows)
                        anew += [name] * (isinstance(given, Packed) and layer.weight_scale is not None)
                else:
                    _fill_dense(mine[0].view(as_matrix(mine[0].shape)), rows)
            except ValueError as error:
                raise ConfigError(f"{name} cannot be used: {error}") from error
            bar.update(sum(wanted.pop(id(target), 0) for target in mine))
    absent = [name for name, parameter in targets.items() if id(parameter) in wanted]
    if absent:
        raise ConfigError(f"{len(absent)} tensors of the model got no values, for example {absent[0]}")
    return anew


def _checked(rows: Rows, a: int, b: int) -> Tensor:
    """Rows a … b−1. Raises ``ValueError`` if one of their values is not finite."""
    values = rows(a, b)
    if not is_finite(values):
        raise ValueError(
            f"rows {a} to {b - 1} hold inf or nan. Every weight must be finite; copy the model again, or start from "
            "another one"
        )
    return values


def _fill_dense(target: Tensor, rows: Rows) -> None:
    for a, b in row_tiles(target.shape):
        part = target[a:b] if target.ndim else target
        part.copy_(rows(a, b))
        if target.dtype != torch.float32 and not is_finite(part):
            kind = str(target.dtype).removeprefix("torch.")
            wider = "bfloat16" if target.dtype == torch.float16 else "float32"
            raise ValueError(f"rows {a} to {b - 1} hold values beyond {kind}'s range; set model.dtype={wider}")


def _fill_layer(layer: LowRankLinear, rows: Rows) -> None:
    if layer.transposed:  # stored (in, out) there, and groups run along in: whole
        layer.store(0, rows(0, layer.in_features).T)
        return
    for a, b in row_tiles(layer.weight.shape):
        layer.store(a, rows(a, b))


def _take_integers(layer: LowRankLinear, packed: Packed) -> bool:
    """Store the integers and scales of ``packed`` as they are; False if ``layer`` groups its weight otherwise."""
    if layer.weight_scale is None or layer.transposed or layer.weight_scale.shape[1] != packed.groups:
        return False
    for a, b in row_tiles(layer.weight.shape):
        codes, scales = packed.codes(a, b)
        first, codes = shards.overlap(layer.weight, a, codes)
        _, scales = shards.overlap(layer.weight, a, scales)
        part = slice(first, first + codes.shape[0])
        shards.local(layer.weight)[part] = codes.to(layer.weight.device)
        shards.local(layer.weight_scale)[part] = scales.to(layer.weight.device)
    return True
