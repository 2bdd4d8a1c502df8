"""Filling a model and its optimizer from a checkpoint's tensors, none of which is taken on trust.

The seals of a checkpoint tell whether its bytes are those that were written. Here it is seen whether they are those of
this model: every name, shape, dtype and kind of number, and that all values are finite.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import ConfigError
from ..lowrank.layers.linear import LowRankLinear
from ..lowrank.tensors.base import TrainedTensor
from ..lowrank.tensors.states import made_by_a_step
from ..parallel import apart, shards
from ..parallel.kept import Kept
from .headers import TILE_ELEMENTS, is_finite

KINDS = ("inner", "extra")  # of an optimizer's tensors: the inner optimizer's state, and all else


def flatten(state: dict[str, Any]) -> tuple[dict[str, Tensor | Kept], dict[str, Any]]:
    """Split an optimizer's state dict into tensors, named ``slot|kind|name``, and what JSON can hold."""
    tensors: dict[str, Tensor | Kept] = {}
    rest = {"step_count": state["step_count"], "groups": state["groups"], "slots": {}}
    for slot, parts in state["slots"].items():
        scalars: dict[str, Any] = {"inner": {}, "extra": {}}
        for kind in KINDS:
            for name, value in parts[kind].items():
                if isinstance(value, (Tensor, Kept)):
                    tensors[f"{slot}|{kind}|{name}"] = value
                else:
                    scalars[kind][name] = value
        rest["slots"][slot] = {**scalars, **{k: v for k, v in parts.items() if k not in KINDS}}
    return tensors, rest


def _unflatten(tensors: Iterable[tuple[str, Tensor]], rest: dict[str, Any]) -> dict[str, Any]:
    """Inverse of :func:`flatten`. Raises ``ValueError`` for a tensor that belongs to no slot, or is not finite."""
    slots = {slot: {**parts, **{kind: dict(parts[kind]) for kind in KINDS}} for slot, parts in rest["slots"].items()}
    for key, value in tensors:
        slot, kind, name = (*key.rsplit("|", 2), "", "")[:3]
        if slot not in slots or kind not in KINDS:
            raise ValueError(f"the model has no optimizer state {key}")
        _check_finite(key, value)
        slots[slot][kind][name] = value
    return {**rest, "slots": slots}


def _check_finite(name: str, value: Tensor) -> None:
    # In parts, which need little memory beside the tensor.
    if not all(map(is_finite, value.reshape(-1).split(TILE_ELEMENTS))):
        raise ValueError(f"{name} holds values that are not finite")


def first_not_finite(model: nn.Module) -> str | None:
    """The name of a tensor of ``model`` with a value that is not finite; None if there is none."""
    for name, value in apart.kept_in(model).items():
        here = shards.local(value)
        if here.is_floating_point() and not bool(torch.isfinite(here).all()):
            return name
    return None


@contextmanager
def usable(folder: Path) -> Iterator[None]:
    """Inside, what is wrong with the files of the checkpoint ``folder`` is raised as :class:`ConfigError`."""
    try:
        yield
    except (OSError, SafetensorError, ValueError) as error:
        raise ConfigError(f"checkpoint {folder} cannot be used: {error}") from error


def _tensors(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name in filter(wanted, file.keys()):
            yield name, file.get_tensor(name).clone()  # the library's own may be backed by the file


def load_into(folder: Path, state: dict[str, Any], model: nn.Module, optimizer) -> None:
    """Fill ``model`` and ``optimizer`` (a LowRankOptimizer) from a checkpoint whose ``state`` its seal vouches for.
    Raises :class:`ConfigError` if the tensors or numbers are those of another model, or are not finite."""
    load_model(folder, model)
    with usable(folder):
        mine = [tensor for tensor in optimizer.tensors if not tensor.elsewhere]
        others = {tensor.name for tensor in optimizer.tensors} - {tensor.name for tensor in mine}
        files = _tensors(folder / "optimizer.safetensors", lambda key: key.rsplit("|", 2)[0] not in others)
        saved = _unflatten(files, state["optimizer"])
        _check_numbers(optimizer, saved)
        for tensor in mine:
            _check_tensor(tensor, saved["slots"][tensor.name])
        for tensor in optimizer.tensors:
            _check_progress(tensor, saved["slots"][tensor.name])
        optimizer.load_state_dict(saved)
        known: dict[Any, dict[str, Any]] = {}
        for tensor in mine:
            _check_inner(tensor, known)


def _check_numbers(optimizer, saved: dict[str, Any]) -> None:
    now = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    fits = like(0, saved["step_count"]) and like(now, saved["groups"]) and len(now) == len(saved["groups"])
    if not fits or saved["step_count"] < 0:
        raise ValueError("its state.json says nothing sensible under optimizer.step_count or optimizer.groups")
    if apart := {tensor.name for tensor in optimizer.tensors} ^ set(saved["slots"]):
        raise ValueError(f"optimizer state and model differ in {len(apart)} tensors, for example {min(apart)}")


def _check_tensor(tensor: TrainedTensor, saved: dict[str, Any]) -> None:
    """What a trained tensor copies, before it does."""
    wanted = tensor.tensors()
    if set(saved["extra"]) != set(wanted):
        raise ValueError(f"{tensor.name} has the state {sorted(saved['extra'])} instead of {sorted(wanted)}")
    for name, value in wanted.items():
        _check_same(f"{tensor.name}|extra|{name}", saved["extra"][name], value)
    numbers = {name.split(".")[0] for name in saved["inner"]} if len(tensor.parts) > 1 else set()
    if numbers - {str(number) for number in range(len(tensor.parts))}:
        raise ValueError(
            f"{tensor.name} has the state of parts {sorted(numbers)}, and steps in {len(tensor.parts)} parts"
        )


def _check_progress(tensor: TrainedTensor, saved: dict[str, Any]) -> None:
    """What a trained tensor builds its schedule from, also where another process has its state."""
    if tensor.module is None:
        return
    now = tensor.progress()
    found: dict[str, Any] = {name: saved.get(name) for name in now}
    gaps = found["schedule"] if like(now["schedule"], found["schedule"]) else {}
    if min(gaps.get("base_gap", 0), gaps.get("first_gap", 0)) < 1 or not _are_choices(now, found):
        raise ValueError(f"its state.json says nothing sensible under optimizer.slots.{tensor.name}")
    if found.get("rank") != now.get("rank"):
        raise ValueError(f"{tensor.name} has rank {found['rank']} in state.json and bases of rank {now['rank']}")


def _are_choices(now: dict[str, Any], found: dict[str, Any]) -> bool:
    """Whether what was measured of int8 products has the same keys, with single values (None before a measurement)."""
    if "products" not in now:
        return True
    kept = found["products"] if isinstance(found["products"], dict) else {}
    return kept.keys() == now["products"].keys() and all(
        isinstance(kept[name], dict)
        and kept[name].keys() == now["products"][name].keys()
        and not any(isinstance(value, (dict, list)) for value in kept[name].values())
        for name in kept
    )


def _check_same(name: str, value: Any, wanted: Any) -> None:
    if torch.is_tensor(value) and torch.is_tensor(wanted):
        if (value.shape, value.dtype) != (wanted.shape, wanted.dtype):
            raise ValueError(
                f"{name} is {tuple(value.shape)} {value.dtype} in the checkpoint and {tuple(wanted.shape)} "
                f"{wanted.dtype} here"
            )
    elif torch.is_tensor(value) or torch.is_tensor(wanted) or not like(wanted, value):
        raise ValueError(f"{name} is a {type(value).__name__} in the checkpoint and a {type(wanted).__name__} here")


def _check_inner(tensor: TrainedTensor, known: dict[Any, dict[str, Any]]) -> None:
    """The inner optimizers' states, against those that a step makes; tried once for each size and kept in ``known``."""
    for part in tensor.parts:
        state = part.state()
        if not state:
            continue
        key = (type(part.inner), part.leaf.shape)
        if key not in known:
            known[key] = made_by_a_step(part)
        if absent := known[key].keys() - state.keys():
            raise ValueError(f"{tensor.name} has no {min(absent)} of {type(part.inner).__name__}")
        for name, wanted in known[key].items():
            _check_same(f"{tensor.name}|inner|{name}", state[name], wanted)


def like(wanted: Any, value: Any) -> bool:
    """Whether ``value``, read from JSON, is of the same make as ``wanted``: no key that this has not, lists of numbers,
    finite numbers below 2⁶³, all of the same type."""
    if isinstance(wanted, dict):
        return isinstance(value, dict) and all(key in wanted and like(wanted[key], value[key]) for key in value)
    if isinstance(wanted, (list, tuple)):
        if not isinstance(value, (list, tuple)):
            return False
        if wanted and len(wanted) == len(value):
            return all(map(like, wanted, value))
        return all(like(0.0, item) or like(0, item) for item in value)
    if type(wanted) is not type(value):
        return False
    return not isinstance(value, (int, float)) or (math.isfinite(value) and abs(value) < 2**63)


def _fit_ranks(model: nn.Module, files: list[Path]) -> None:
    """Give the layers of ``model`` whose rank is free to move the ranks that ``files`` have."""
    shapes = {}
    for path in files:
        with safe_open(path, framework="np") as file:  # which needs no memory for the file, however large it is
            shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear):
            module.fit(shapes, f"{name}.")


def fitting(
    folder: Path, model: nn.Module, read: Callable[[Path], Iterable[tuple[str, Tensor]]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every tensor that ``read`` finds in ``model.safetensors`` or its shards, behind the one of ``model`` that it is
    for; of tied tensors one name is enough. Ranks that are free to move are set first. Raises ``OSError`` and
    ``ValueError``."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise OSError("it has no model.safetensors")
    _fit_ranks(model, files)
    own = model.state_dict(keep_vars=True)
    loaded = set()
    for name, value in (item for path in files for item in read(path)):
        if name not in own:
            raise ValueError(f"the model has no tensor {name}")
        if own[name].shape != value.shape or own[name].dtype != value.dtype:
            raise ValueError(
                f"{name} is {tuple(value.shape)} {value.dtype} in the checkpoint and {tuple(own[name].shape)} "
                f"{own[name].dtype} in the model"
            )
        _check_finite(name, value)
        yield own[name], value
        loaded.add(_place(own[name]))
    if absent := [name for name, value in own.items() if value.numel() and _place(value) not in loaded]:
        raise ValueError(f"the checkpoint has no tensor {min(absent)}")


def _place(tensor: Tensor) -> int:
    """Where the memory of ``tensor`` begins, which is that of the tensors tied to it. On the meta device, where there
    is none, tied tensors are one object."""
    return shards.local(apart.kept(tensor)).data_ptr() or id(tensor)


def load_model(folder: Path, model: nn.Module) -> None:
    """Fill ``model`` alone from ``model.safetensors`` or its shards. Raises :class:`ConfigError` if the tensors are
    those of another model, or hold values that are not finite."""
    with usable(folder), torch.no_grad():
        for mine, value in fitting(folder, model, _tensors):
            stored = apart.kept(mine)
            shards.local(stored).copy_(shards.rows_of(stored, value))
    apart.drop_all(model)
