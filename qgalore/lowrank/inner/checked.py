"""The optimizer that steps each leaf: any ``torch.optim.Optimizer`` class, checked before it is trusted."""

import importlib
import logging
import warnings
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor
from torch.optim import Optimizer

from ...errors import ConfigError
from ..subspace.moments import FIRST_MOMENTS, SECOND_MOMENTS
from .adam4bit import AdamW4bit
from .adam8bit import AdamW8bitCPU, AdamW8bitFunctional

Factory = Callable[[Iterable[Tensor]], Optimizer]
BUILTIN = ("adamw8bit", "adamw4bit", "adamw")
# Importing bitsandbytes warns of a 4-bit matrix product on CPUs that nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
CODED = {"adamw8bit": 0.1, "adamw4bit": 0.15}  # names, and the mean error of an update that a self-check allows
_CHECK_LR = 0.1
_ELEMENTS = 8192  # above bitsandbytes' 4,096-element threshold for 8-bit states


def adamw8bit_class(device: torch.device) -> type[Optimizer]:
    """What ``adamw8bit`` means on ``device``: our own code on a CPU, bitsandbytes' elsewhere; one format of state.

    Raises :class:`ConfigError` where bitsandbytes is needed and cannot be imported.
    """
    if device.type == "cpu":
        return AdamW8bitCPU
    try:
        import bitsandbytes.functional  # noqa: F401
    except Exception as error:
        raise ConfigError(
            f"optimizer 'adamw8bit' needs the package bitsandbytes, which cannot be imported: {error}. "
            "Install it (pip install bitsandbytes) or set train.optimizer=adamw."
        ) from error
    return AdamW8bitFunctional


def adamw8bit(params: Iterable[Tensor], **options) -> Optimizer:
    """The 8-bit AdamW for the device that all of ``params`` are on."""
    params = list(params)
    return adamw8bit_class(params[0].device)(params, **options)


def describe(name: str, device: torch.device) -> str:
    """``name`` as shown to the user, with the code that runs it where that depends on the device."""
    if name == "adamw4bit":
        return "adamw4bit (qgalore's own code)"
    if name != "adamw8bit":
        return name
    if device.type == "cpu":
        return "adamw8bit (qgalore's CPU code; train.optimizer=bitsandbytes.optim.AdamW8bit selects bitsandbytes)"
    return "adamw8bit (bitsandbytes)"


def optimizer_class(name: str) -> Callable[..., Optimizer]:
    """``adamw8bit`` (see :func:`adamw8bit_class`), ``adamw4bit`` (ours), ``adamw`` (torch) or a dotted path,
    ``torch.optim.Adafactor`` say.

    Raises :class:`ConfigError` if it cannot be imported or is not an optimizer.
    """
    if name == "adamw8bit":
        return adamw8bit
    if name == "adamw4bit":
        return AdamW4bit
    if name == "adamw":
        return torch.optim.AdamW
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ConfigError(
            f"optimizer {name!r} cannot be imported ({error}); use {' or '.join(BUILTIN)} or a dotted path such as "
            "torch.optim.Adafactor"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        raise ConfigError(f"optimizer {name!r} is a {type(found).__name__}, not a torch.optim.Optimizer class")
    return found


def make_factory(name: str | type[Optimizer], lr: float, options: dict) -> Factory:
    """A function params → optimizer, with weight decay off: decay belongs to the merge.

    Raises :class:`ConfigError` for options that the class does not take, and for ``weight_decay`` among them.
    """
    cls = optimizer_class(name) if isinstance(name, str) else name
    if "lr" in options or "params" in options:
        raise ConfigError(
            "the learning rate is train.lr, scheduled and applied by the trainer: not an optimizer option"
        )
    if options.get("weight_decay"):
        raise ConfigError("weight_decay is applied at the merge: set train.weight_decay, not an optimizer option")
    make = partial(cls, lr=lr, **{**options, "weight_decay": 0.0})
    try:
        make([torch.nn.Parameter(torch.zeros(1))])
    except Exception as error:  # each optimizer checks its arguments in its own way
        if "weight_decay" not in str(error):
            raise ConfigError(f"optimizer {cls.__name__} does not take the options {options}: {error}") from error
        # A class without decay at all.
        make = partial(cls, lr=lr, **options)
    return make


def _run(factory: Factory, start: Tensor, gradients: list[Tensor]) -> Tensor:
    """Where ``start`` moves to under the gradients, minus ``start``."""
    leaf = torch.nn.Parameter(start.clone())
    optimizer = factory([leaf])
    for group in optimizer.param_groups:
        group["lr"] = _CHECK_LR
    for gradient in gradients:
        leaf.grad = gradient.clone()
        optimizer.step()
    return leaf.detach() - start


def _probe_gradients(device: torch.device, steps: int, shape: tuple[int, ...] = (64, _ELEMENTS // 64)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, device="cpu").to(device) for _ in range(steps)]


def check_ignores_value(factory: Factory, device: torch.device) -> None:
    """Refuse an optimizer whose step depends on the parameter's own value, by trying: Δ is zero at the start of every
    step, so trust ratios (LAMB), Adafactor's relative step size or a built-in decay would silently mean something else.

    Tried on a large matrix, a small one and a vector: bitsandbytes takes another path below 4,096 elements. Raises
    :class:`ConfigError`, also for an optimizer that cannot take an ordinary step (LBFGS, SparseAdam).
    """
    for shape in ((64, _ELEMENTS // 64), (16, 16), (48,)):
        gradients = _probe_gradients(device, 2, shape)
        zero = torch.zeros_like(gradients[0])
        try:
            with warnings.catch_warnings():
                # Optimizers may warn about their arguments once for each try.
                warnings.simplefilter("ignore")
                name = type(factory([torch.nn.Parameter(zero.clone())])).__name__
                from_zero = _run(factory, zero, gradients)
                from_half = _run(factory, zero + 0.5, gradients)
        except ConfigError:
            raise
        except Exception as error:  # anything an unknown optimizer may raise
            raise ConfigError(f"the optimizer cannot take a trial step: {type(error).__name__}: {error}") from error
        # fp32 near 0.5 resolves 2⁻²⁴, met twice in two steps; a dependence shows as a share of the step (0.1).
        if not torch.allclose(from_zero, from_half, rtol=1e-3, atol=1e-5):
            raise ConfigError(
                f"optimizer {name} takes a step that depends on the parameter's own value (a trust ratio, a relative "
                "step size or a decay). Δ starts every step at zero, so this would train something else than asked. "
                "Switch that feature off (for torch.optim.Adafactor: eps=[null, 1.0]) or choose another optimizer."
            )


def check_rotates(factory: Factory, device: torch.device) -> None:
    """Refuse ``moments: rotate`` for an optimizer whose state is not first and second moments, by trying a step.

    Under gradients of −1 a first moment is negative and a second one positive, which tells bitsandbytes' Lion from its
    RMSprop though both call theirs ``state1``. Raises :class:`ConfigError`.
    """
    leaf = torch.nn.Parameter(torch.zeros(8, 8, device=device))
    optimizer = factory([leaf])
    leaf.grad = -torch.ones_like(leaf)
    optimizer.step()
    for name, value in optimizer.state.get(leaf, {}).items():
        if not torch.is_tensor(value) or value.numel() == 1 or name.startswith(("qmap", "absmax")):
            continue
        first = name in FIRST_MOMENTS and bool((value <= 0).all())
        second = name in SECOND_MOMENTS and bool((value >= 0).all())
        if value.shape != leaf.shape or not (first or second):
            raise ConfigError(
                f"{type(optimizer).__name__} keeps {name!r}, which moments 'rotate' cannot turn into new coordinates; "
                "set lowrank.moments=keep or lowrank.moments=reset"
            )


def check_coded(name: str, factory: Factory, betas: tuple[float, float], eps: float, device: torch.device) -> None:
    """Compare two steps of a coded AdamW (``name``: of ``CODED``) with ``torch.optim.AdamW``'s and refuse to train on a
    mismatch.

    The first step meets no quantized state and must agree to fp32 error. The second reads it back. The 8-bit dynamic
    code has a relative step of at most about 0.07 there, so the mean error of the update stays under 0.1. The 4-bit
    codes give one of 0.08 to 0.10 here, for any betas; half as much again is allowed.
    """
    reference = partial(torch.optim.AdamW, lr=_CHECK_LR, betas=betas, eps=eps, weight_decay=0.0)
    gradients = _probe_gradients(device, 2)
    zero = torch.zeros_like(gradients[0])
    for steps, tolerance in ((1, 1e-4), (2, CODED[name])):
        got, wanted = (_run(make, zero, gradients[:steps]) for make in (factory, reference))
        error = float((got - wanted).abs().mean() / wanted.abs().mean())
        if not error <= tolerance:
            raise ConfigError(
                f"{name} failed its self-check on {device}: after {steps} step(s) its update differs from "
                f"torch.optim.AdamW's by {error:.1%} on average (allowed {tolerance:.2%}). Its code is not usable "
                "here: set train.optimizer=adamw, or, for adamw8bit on a GPU, install another bitsandbytes."
            )
