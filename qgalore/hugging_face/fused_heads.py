"""Losses that read the output head's weight themselves, refused where that weight is none.

TRL's trainers multiply the hidden states with ``lm_head.weight`` and never call the head. A converted head keeps int8
codes there, which would be taken for weights, and its gradient would reach no leaf that the optimizer steps.
"""

from typing import Any

from torch import nn

from ..errors import ConfigError
from ..lowrank.layers.embedding import TiedHead
from ..lowrank.layers.linear import LowRankLinear

ASKED = "fused_lm_head"  # what TRL's trainers pass to a model whose forward they replaced
REMEDY = (
    "leave the head as it is: call qgalore.convert with embeddings='full' (the default), and with no pattern in "
    "include that names the head"
)


def converted_head(model: nn.Module) -> bool:
    """Whether the output head of ``model`` is a low-rank layer, or shares the weight of one."""
    find = getattr(model, "get_output_embeddings", None)
    return find is not None and isinstance(find(), LowRankLinear | TiedHead)


def watch(model: nn.Module) -> None:
    """Let every forward pass of a ``model`` with a converted head look at what it is asked for."""
    if converted_head(model):
        model.register_forward_pre_hook(_refuse, with_kwargs=True)


def _refuse(model: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
    if options.get(ASKED):
        raise ConfigError(
            f"{type(model).__name__} has a converted output head, and this trainer's loss reads the head's weight "
            f"itself ({ASKED}=True), which would take stored codes for weights and never train the head; {REMEDY}"
        )
