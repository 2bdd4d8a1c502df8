"""``torch.compile`` of transformer blocks, one at a time, for the steps that are alike.

Which leaf of a layer wants a gradient is part of a compiled graph. Layers are refreshed in turn, so a graph for each
combination of them would soon pass dynamo's limit, beyond which it quietly stops compiling. A block is compiled only
for its ordinary step, and runs as it was written where a layer's probe is armed or its integer products are on trial,
and without gradients: one graph serves all blocks of a kind. ``fullgraph=True`` makes whatever dynamo cannot trace, and
that limit, an error.

Checkpointing is part of the block, hence of its graph. Autograd sees a compiled block as one operation: its gradients
are there together, and only then does fused stepping free them.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..errors import ConfigError
from ..lowrank.layers.experts import Experts
from ..lowrank.layers.linear import LowRankLinear

LEAVES = ("delta", "probe", None)
KINDS = 4  # of blocks that differ in which products are int8; dynamo keeps 8 graphs, some of them for other lengths


def check_compiler(device: torch.device) -> None:
    """Compile something small. Raises :class:`ConfigError` where that fails, for want of a C++ compiler, say."""
    from torch._inductor.utils import fresh_cache  # the compiler takes seconds to import

    failure = None
    with fresh_cache():  # what was compiled here before would need no compiler now
        try:
            torch.compile(lambda x: x.sin() + 1, fullgraph=True)(torch.zeros(64, device=device))
        except Exception as error:  # whatever a compiler or its driver raises
            failure = error
    torch.compiler.reset()
    if failure is not None:
        reason = (str(failure).strip().splitlines() or [type(failure).__name__])[0]
        raise ConfigError(
            f"model.compile is 'blocks', but torch.compile fails on {device.type}: {reason}. It needs a C++ compiler, "
            "and on a GPU Triton; install them or set model.compile to none"
        ) from failure


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def blocks_to_compile(model: nn.Module) -> list[nn.Module]:
    """The blocks of a converted model. Raises :class:`ConfigError` if there are none, and for a mixture's."""
    blocks = blocks_of(model)
    if not blocks:
        raise ConfigError(
            f"{type(model).__name__} has no blocks that transformers marks as such; set model.compile=none"
        )
    if any(isinstance(module, Experts) for module in model.modules()):
        raise ConfigError(
            f"{type(model).__name__} is a mixture of experts, and how many tokens each of them gets is not known when "
            "a block is compiled; set model.compile=none"
        )
    return blocks


def compile_blocks(model: nn.Module, leaf: str | None, backend: str | Callable = "inductor") -> int:
    """Compile every block of ``model`` for steps in which the ``leaf`` of its low-rank layers wants a gradient
    (``delta``, ``probe``, or None of them) and no other; returns how many. Raises what :func:`blocks_to_compile` does,
    and in the first such step where dynamo cannot compile one."""
    assert leaf in LEAVES
    blocks = blocks_to_compile(model)
    kinds: dict[tuple, bool] = {}
    for block in blocks:
        block.forward = _switch(block, leaf, backend, kinds)
    return len(blocks)


def _is_ordinary(layer: LowRankLinear, leaf: str | None) -> bool:
    if layer.products is not None and layer.products.due:
        return False
    return all(value.requires_grad == (name == leaf) for name, value in layer.leaves().items())


def _is_known(layers: list[LowRankLinear], kinds: dict[tuple, bool]) -> bool:
    """Whether a block of these layers is compiled: those of the first ``KINDS`` kinds are."""
    kind = tuple(layer.products and layer.products.taken for layer in layers)
    if kind not in kinds:
        kinds[kind] = len(kinds) < KINDS
        if not kinds[kind]:
            print(f"{'compile:':<11}{KINDS} kinds of blocks, by their int8 products, are compiled; one more is not")
    return kinds[kind]


def _switch(block: nn.Module, leaf: str | None, backend: str | Callable, kinds: dict[tuple, bool]) -> Callable:
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    written = block.forward
    compiled = torch.compile(written, backend=backend, fullgraph=True)
    layers = [module for module in block.modules() if isinstance(module, LowRankLinear)]

    @wraps(written)
    def forward(*args: Any, **kwargs: Any) -> Any:
        ordinary = block.training and torch.is_grad_enabled() and all(_is_ordinary(layer, leaf) for layer in layers)
        if not ordinary or not _is_known(layers, kinds):
            return written(*args, **kwargs)
        try:
            return compiled(*args, **kwargs)
        except (FailOnRecompileLimitHit, TorchDynamoException) as error:
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            raise ConfigError(
                f"{type(block).__name__} cannot be compiled: {reason}; set model.compile=none, or look for the cause "
                "with TORCH_LOGS=recompiles"
            ) from error

    return forward
