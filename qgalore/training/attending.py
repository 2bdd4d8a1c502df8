"""How the model of a run attends: ``model.attention`` and what follows from it."""

from torch import nn

from ..config import Config
from ..errors import ConfigError
from ..memory import stand_ins
from ..models import attention

_WAYS = {
    "sdpa": "scaled_dot_product_attention with a mask for each row",
    "eager": "all scores of a row at once, and a mask",
    "flex": "flex attention, which skips blocks between documents",
}


def _attend_by(model: nn.Module, asked: str) -> str:
    """A line about ``model``, which attends as asked now. Where it does not know ``sdpa`` it stays as it is."""
    reason = attention.use(model, attention.FLEX if asked == "flex" else asked)
    if reason is None:
        return _WAYS[asked]
    if asked == "sdpa":
        return f"{attention.implementation(model)} and not sdpa: {reason}"
    raise ConfigError(f"model.attention is {asked}, and the model does not know it: {reason}. Set model.attention=auto")


def attend_as(config: Config, model: nn.Module) -> str | None:
    """Let ``model``, on the meta device and converted, attend as ``config`` says; returns a line about it, if there is
    something to say. Raises :class:`ConfigError` if the model cannot attend as it is asked to."""
    asked = config.model.attention
    if asked != "auto":
        return _attend_by(model, asked)
    if config.data.task == "classify" or config.data.document_attention == "joined":
        return None  # no row holds documents to keep apart
    reason = "a compiled block would be compiled anew for every row"
    if config.model.compile == "none":
        with stand_ins.kernels(config.device):
            reason = attention.use_by_document(model, config.data.sequence_length)
    return "a causal call for each document" if reason is None else f"a mask keeps documents apart, because {reason}"
