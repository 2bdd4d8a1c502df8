"""qgalore: training all the weights of a language model in little memory.

report = qgalore.convert(model, rank=128)          # int8 weights, int4 projections, in place
optimizer = qgalore.optimizer(model, lr=1e-3)      # an ordinary torch.optim.Optimizer
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["convert", "optimizer"]


def __getattr__(name: str) -> Any:
    """Import the two entry points on first use: they bring torch and transformers with them."""
    if name == "convert":
        from .models.convert import convert

        return convert
    if name == "optimizer":
        from .lowrank.optimizer import optimizer

        return optimizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
