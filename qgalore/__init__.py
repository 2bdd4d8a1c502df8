"""qgalore: training all the weights of a language model in little memory.

report = qgalore.convert(model, rank=128)          # int8 weights, int4 projections, in place
optimizer = qgalore.optimizer(model, lr=1e-3)      # an ordinary torch.optim.Optimizer
qgalore.step(model, optimizer, batches, loss=…)    # a whole step, block by block, or backward() and optimizer.step()
qgalore.save(model, folder)                        # for transformers' from_pretrained
qgalore.load(model, folder)                        # a converted model's own tensors, from a checkpoint
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
_PLACES = {
    "convert": "library",
    "load": "library",
    "optimizer": "lowrank.factory",
    "save": "library",
    "step": "steps.api",
    "TrainerGuard": "hugging_face.trainer_guard",
}
__all__ = ["TrainerGuard", "convert", "load", "optimizer", "save", "step"]


def __getattr__(name: str) -> Any:
    """Import an entry point on first use: they bring torch and transformers with them."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_PLACES[name]}", __name__), name)
