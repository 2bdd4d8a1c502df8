"""Saving and loading for programs that train with :func:`qgalore.optimizer` in a loop of their own."""

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import checkpoint
from .errors import ConfigError
from .export import huggingface


def save(
    model: PreTrainedModel,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write a converted ``model`` as an ordinary Hugging Face folder, its floating-point tensors in ``dtype``.

    Raises :class:`ConfigError` if the folder cannot be written.
    """
    try:
        huggingface.save(model, tokenizer, Path(folder), dtype)
    except OSError as error:
        raise ConfigError(f"{folder} could not be written: {error}") from error


def load(model: torch.nn.Module, folder: str | Path) -> None:
    """Fill a converted ``model`` with the tensors in ``folder``: a checkpoint of a run, or of Hugging Face's Trainer.

    ``model`` must have been converted with the same options. Build the optimizer afterwards, or load its state too: it
    keeps fp32 copies of norms and biases. Raises :class:`ConfigError` if the tensors are those of another model.
    """
    checkpoint.load_model(Path(folder), model)
