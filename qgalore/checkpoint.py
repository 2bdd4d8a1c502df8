"""Checkpoints: safetensors and one JSON in a folder that appears whole or not at all.

``model.safetensors``: the model's state dict. ``optimizer.safetensors``: inner states and fp32 masters, named
``slot|kind|name``. ``state.json``: schedules, scalars, positions, the resolved configuration.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .errors import ConfigError

VERSION = 1
PREFIX = "step-"


def _flatten(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimizer's state dict into tensors and what JSON can hold."""
    tensors: dict[str, Tensor] = {}
    rest = {"step_count": state["step_count"], "groups": state["groups"], "slots": {}}
    for slot, parts in state["slots"].items():
        scalars: dict[str, Any] = {"inner": {}, "extra": {}}
        for kind in ("inner", "extra"):
            for name, value in parts[kind].items():
                if torch.is_tensor(value):
                    tensors[f"{slot}|{kind}|{name}"] = value
                else:
                    scalars[kind][name] = value
        rest["slots"][slot] = {**scalars, **{k: v for k, v in parts.items() if k not in ("inner", "extra")}}
    return tensors, rest


def _unflatten(tensors: dict[str, Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    state = {**rest, "slots": {slot: {**parts} for slot, parts in rest["slots"].items()}}
    for key, value in tensors.items():
        slot, kind, name = key.rsplit("|", 2)
        state["slots"][slot][kind][name] = value
    return state


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory: tied weights keep the first of their names."""
    seen: set[int] = set()
    kept = {}
    for name, value in tensors.items():
        if value.numel() and value.data_ptr() in seen:
            continue
        seen.add(value.data_ptr())
        kept[name] = value.detach().contiguous()
    return kept


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(folder: Path, model: nn.Module, optimizer_state: dict[str, Any], run_state: dict[str, Any]) -> Path:
    """Write ``folder`` (…/step-00000100) through a temporary sibling, fsync'd and renamed. Raises ``ConfigError`` on an
    I/O error, naming the folder; the other checkpoints stay as they are."""
    building = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        tensors, rest = _flatten(optimizer_state)
        save_file(_unshared(model.state_dict()), building / "model.safetensors")
        save_file({name: value.contiguous() for name, value in tensors.items()}, building / "optimizer.safetensors")
        document = {"version": VERSION, **run_state, "optimizer": rest}
        (building / "state.json").write_text(json.dumps(document), encoding="utf-8")
        for file in building.iterdir():
            _sync(file)
        if folder.exists():
            shutil.rmtree(folder)
        building.rename(folder)
        _sync(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(building, ignore_errors=True)
        raise ConfigError(
            f"the checkpoint {folder} could not be written: {error}. Older checkpoints are intact; free space or set "
            "another run.dir, then continue with --resume auto"
        ) from error
    return folder


def steps_in(folder: Path) -> list[Path]:
    """The complete checkpoints under ``folder``, oldest first."""
    found = [p for p in folder.glob(f"{PREFIX}*") if (p / "state.json").is_file()]
    return sorted(found, key=lambda p: p.name)


def name_for(step: int) -> str:
    return f"{PREFIX}{step:08d}"


def prune(folder: Path, keep_last: int) -> None:
    """Delete all but the newest ``keep_last`` checkpoints under ``folder``."""
    for old in steps_in(folder)[:-keep_last]:
        shutil.rmtree(old)


def read_state(folder: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint. Raises :class:`ConfigError` if it is missing, damaged or of another version."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} is not a complete checkpoint: {error}") from error
    if not isinstance(state, dict) or state.get("version") != VERSION:
        version = state.get("version") if isinstance(state, dict) else None
        raise ConfigError(f"{folder} has checkpoint version {version}; this program reads version {VERSION}")
    return state


def load_into(folder: Path, model: nn.Module, optimizer) -> dict[str, Any]:
    """Fill ``model`` and ``optimizer`` (a LowRankOptimizer) and return the run state.

    Raises :class:`ConfigError` if the files cannot be read or belong to another model or configuration.
    """
    state = read_state(folder)
    try:
        weights = load_file(folder / "model.safetensors")
        tensors = load_file(folder / "optimizer.safetensors")
        own = _unshared(model.state_dict())
        if set(weights) != set(own):
            odd = min(set(weights) ^ set(own))
            raise ValueError(f"the checkpoint and the model differ in tensors, for example {odd}")
        for name, value in own.items():
            if weights[name].shape != value.shape or weights[name].dtype != value.dtype:
                raise ValueError(
                    f"{name} is {tuple(weights[name].shape)} {weights[name].dtype} in the checkpoint and "
                    f"{tuple(value.shape)} {value.dtype} in the model"
                )
        model.load_state_dict(weights, strict=False)
        optimizer.load_state_dict(_unflatten(tensors, state["optimizer"]))
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise ConfigError(f"checkpoint {folder} cannot be used: {error}") from error
    return state
