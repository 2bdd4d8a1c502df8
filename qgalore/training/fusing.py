"""What computes the elementwise operations of a run's model: ``model.elementwise`` and what follows from it."""

from importlib.util import find_spec

import torch
from torch import nn

from ..config import Config
from ..errors import ConfigError
from ..models import elementwise
from ..quant import dispatch


def _obstacle(config: Config, device: torch.device | None) -> str | None:
    """Why Liger's kernels are not used, None if nothing is known against them. ``device``: None for a plan of a GPU
    that is not here."""
    if config.model.compile == "blocks":
        return "compiled blocks have kernels of their own"
    if find_spec("liger_kernel") is None:
        return "liger-kernel is not installed (pip install liger-kernel)"
    if config.kernels == "reference":
        return "kernels is reference"
    if device is not None and dispatch.kernels_for(device) is None:
        return f"no Triton kernel runs on {device.type} here"
    return None


def _refused(reason: str) -> ConfigError:
    return ConfigError(f"model.elementwise is liger, and it cannot be: {reason}. Set model.elementwise=auto")


def check_fusing(config: Config, device: torch.device) -> None:
    """Raise :class:`ConfigError` if Liger's kernels must be used, and cannot be on ``device`` whatever the model is."""
    if config.model.elementwise == "liger" and (reason := _obstacle(config, device)) is not None:
        raise _refused(reason)


def fuse_as(config: Config, model: nn.Module, device: torch.device | None) -> str | None:
    """Let Liger's kernels do what ``config`` leaves to them in a converted ``model``; returns a line about it, if there
    is something to say. Raises :class:`ConfigError` if they must be used and cannot.

    Without a ``device``, in a plan for a GPU that is not here, nothing is tried, and ``auto`` takes none of them: a
    plan must not hang on what is installed where it is made."""
    asked, kept = config.model.elementwise, ""
    if asked == "plain" or (asked == "auto" and (config.device == "cpu" or device is None)):
        return None
    reason = _obstacle(config, device)
    if reason is None:
        used, others = elementwise.use(model, device and _sizes(config, model, device))
        kept = ", ".join(others)
        if used:
            return f"Liger's {', '.join(used)}{'; not ' if kept else ''}{kept}"
    if asked == "liger":
        raise _refused(reason or kept)
    return f"plain PyTorch and not Liger's kernels: {reason or kept}"


def _sizes(config: Config, model: nn.Module, device: torch.device) -> elementwise.Sizes:
    rows, heads = config.train.micro_batch_size, elementwise.heads_of(model.config.get_text_config())
    return elementwise.Sizes(device, getattr(torch, config.model.dtype), rows, config.data.sequence_length, heads)
