"""Export as an ordinary Hugging Face folder: dense safetensors, config, tokenizer."""

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import export_folder as folders
from .export_tensors import hub_tensors

READERS = "transformers 4.48 or later, vLLM, and what else reads Hugging Face folders"


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: int | str | None = None,
) -> None:
    """Write ``folder`` so that ``model``'s own class, its ``AutoModelFor…`` and ``AutoTokenizer`` load it, a tensor at
    a time. ``max_shard_size``: bytes, or text such as "5GB"; None for one file. Raises ``OSError``."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = hub_tensors(model, folders.skeleton_of(model, dtype), dtype)
    folders.write(model, tokenizer, folder, entries, dtype=dtype, max_shard_size=max_shard_size)
