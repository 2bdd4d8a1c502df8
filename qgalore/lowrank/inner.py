"""The optimizer that steps each leaf: any ``torch.optim.Optimizer`` class, checked before it is trusted."""

import importlib
import warnings
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import ConfigError

Factory = Callable[[Iterable[Tensor]], Optimizer]
BUILTIN = ("adamw8bit", "adamw")
_CHECK_LR = 0.1
_ELEMENTS = 8192  # above bitsandbytes' 4,096-element threshold for 8-bit states


def _bitsandbytes_adamw8bit() -> type[Optimizer]:
    try:
        from bitsandbytes.optim import AdamW8bit
    except Exception as error:
        raise ConfigError(
            f"optimizer 'adamw8bit' needs the package bitsandbytes, which cannot be imported: {error}. "
            "Install it (pip install bitsandbytes) or set train.optimizer=adamw."
        ) from error
    return AdamW8bit


def optimizer_class(name: str) -> type[Optimizer]:
    """``adamw8bit`` (bitsandbytes), ``adamw`` (torch) or a dotted path such as ``torch.optim.Adafactor``.

    Raises :class:`ConfigError` if it cannot be imported or is not an optimizer.
    """
    if name == "adamw8bit":
        return _bitsandbytes_adamw8bit()
    if name == "adamw":
        return torch.optim.AdamW
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
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
    if options.get("weight_decay"):
        raise ConfigError("weight_decay is applied at the merge: set train.weight_decay, not an optimizer option")
    make = partial(cls, lr=lr, **{**options, "weight_decay": 0.0})
    try:
        make([torch.nn.Parameter(torch.zeros(1))])
    except (TypeError, ValueError) as error:
        if "weight_decay" not in str(error):
            raise ConfigError(f"optimizer {cls.__name__} does not take the options {options}: {error}") from error
        make = partial(cls, lr=lr, **options)  # a class without decay at all
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


def _probe_gradients(device: torch.device, steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(64, _ELEMENTS // 64, generator=generator).to(device) for _ in range(steps)]


def check_ignores_value(factory: Factory, device: torch.device) -> None:
    """Refuse an optimizer whose step depends on the parameter's own value, by trying: Δ is zero at the start of every
    step, so trust ratios (LAMB), Adafactor's relative step size or a built-in decay would silently mean something else.
    """
    gradients = _probe_gradients(device, 2)
    zero = torch.zeros_like(gradients[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # optimizers may warn about their arguments once for each try
        from_zero = _run(factory, zero, gradients)
        from_half = _run(factory, zero + 0.5, gradients)
    # fp32 near 0.5 resolves 2⁻²⁴, met twice in two steps; a dependence on the value shows as a share of the step (0.1).
    if not torch.allclose(from_zero, from_half, rtol=1e-3, atol=1e-5):
        name = type(factory([torch.nn.Parameter(zero)])).__name__
        raise ConfigError(
            f"optimizer {name} takes a step that depends on the parameter's own value (a trust ratio, a relative step "
            "size or a decay). Δ starts every step at zero, so this would train something else than asked. Switch that "
            "feature off (for torch.optim.Adafactor: eps=[null, 1.0]) or choose another optimizer."
        )


def check_adamw8bit(factory: Factory, betas: tuple[float, float], eps: float, device: torch.device) -> None:
    """Compare two 8-bit steps with ``torch.optim.AdamW``'s and refuse to train on a mismatch.

    The first step meets no quantized state and must agree to fp32 error. The second reads back 8-bit moments: their
    dynamic code has a relative step of at most about 0.07 there, so the mean error of the update stays under 0.1.
    """
    reference = partial(torch.optim.AdamW, lr=_CHECK_LR, betas=betas, eps=eps, weight_decay=0.0)
    gradients = _probe_gradients(device, 2)
    zero = torch.zeros_like(gradients[0])
    for steps, tolerance in ((1, 1e-4), (2, 0.1)):
        got, wanted = (_run(make, zero, gradients[:steps]) for make in (factory, reference))
        error = float((got - wanted).abs().mean() / wanted.abs().mean())
        if not error <= tolerance:
            raise ConfigError(
                f"bitsandbytes' AdamW8bit failed its self-check on {device}: after {steps} step(s) its update differs "
                f"from torch.optim.AdamW's by {error:.1%} on average (allowed {tolerance:.2%}). This release or its "
                "native library is not usable here; install another bitsandbytes or set train.optimizer=adamw."
            )
