"""Which modules of a model are converted, and why the others are left."""

from collections import Counter
from collections.abc import Iterator

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import ConfigError
from ..lowrank.layers import conv, experts
from ..lowrank.layers.linear import LowRankLinear
from .conversion_options import Patterns, matches

CONVOLUTION = nn.modules.conv._ConvNd
Named = Iterator[tuple[str, nn.Module]]


def refuse_a_layer(model: nn.Module) -> None:
    """Raise :class:`ConfigError` where ``model`` is itself a layer: it cannot replace itself."""
    layer = isinstance(model, nn.Linear | Conv1D | CONVOLUTION | LowRankLinear)
    if layer or experts.problem(model) is None:
        raise ConfigError(
            f"the model given to convert is itself a layer, a {type(model).__name__}. A layer is replaced inside a "
            "module that holds it: wrap it, for example in torch.nn.Sequential(layer)"
        )


def heads(model: nn.Module) -> dict[nn.Module, str]:
    """The linear layers that a task adds to the pretrained body, each with why it is left: a language model's output
    head, or everything beside the body of a classifier."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if output is not None:
        return {output: "the output head, trained in full"}
    prefix = getattr(model, "base_model_prefix", "")
    if not prefix or not isinstance(getattr(model, prefix, None), nn.Module):
        return {}
    beside = (m for n, m in model.named_modules() if not f"{n}.".startswith(f"{prefix}."))
    return dict.fromkeys(beside, "in the task's head, trained in full")


def linear_layers(model: nn.Module, patterns: Patterns, skipped: dict[str, str]) -> Named:
    """(name, module) of every linear layer to convert; the others go to ``skipped`` with the reason. Raises
    :class:`ConfigError` for a pattern that matches no layer of the model."""
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))]
    names = [name for name, _ in layers]
    names += [n for n, m in model.named_modules() if experts.problem(m) is None or conv.problem(m) is None]
    patterns.check(names)
    users = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    in_head = heads(model)
    for name, module in layers:
        # A head is converted only if a pattern of ``include`` names it.
        left = in_head.get(module) if not matches(name, patterns.include) else None
        why = left or patterns.reason_to_skip(name) or _unfit(module, users[id(module.weight)])
        if why:
            skipped[name] = why
        else:
            yield name, module


def _unfit(module: nn.Module, users: int) -> str | None:
    """Why this layer, whose weight ``users`` modules have, cannot be replaced."""
    if users > 1:
        return "its weight is shared with another module"
    if not module.weight.requires_grad:
        return "its weight is frozen"
    if type(module) not in (nn.Linear, Conv1D):
        return f"a {type(module).__name__}, whose forward may differ from nn.Linear's"
    return None


def stacked_experts(model: nn.Module, patterns: Patterns, skipped: dict[str, str]) -> Named:
    """(name, module) of every experts module to convert; those that the patterns leave go to ``skipped``. Raises
    :class:`ConfigError` for other trainable tensors of more than two dimensions, which would silently train in full."""
    for name, module in list(model.named_modules()):
        own = {key: p for key, p in module.named_parameters(recurse=False) if p.ndim > 2 and min(p.shape) > 1}
        if isinstance(module, CONVOLUTION) or not any(p.requires_grad for p in own.values()):
            continue
        if why := experts.problem(module):
            raise ConfigError(
                f"{name} keeps {sum(p.numel() for p in own.values()):,} values in {len(own)} tensors of more than two "
                f"dimensions, for example {next(iter(own))}, and {why}: they would be trained in full, with Adam's "
                "moments beside them. Take another model, or freeze them first with requires_grad_(False)"
            )
        if why := patterns.reason_to_skip(name):
            skipped[name] = why
        else:
            yield name, module


def convolutions(model: nn.Module, patterns: Patterns, skipped: dict[str, str]) -> Named:
    """(name, module) of every convolution to convert; the others go to ``skipped`` with the reason."""
    for name, module in [(n, m) for n, m in model.named_modules() if isinstance(m, CONVOLUTION)]:
        if why := patterns.reason_to_skip(name) or conv.problem(module):
            skipped[name] = why
        else:
            yield name, module
