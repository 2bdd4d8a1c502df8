"""A look at what a model says."""

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..data.tokenizing import leading_ids
from ..errors import ConfigError


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, longest: int, task: str = "text") -> list[int]:
    """The ids of ``prompt``, with task ``instruct`` as a user's message that waits for its answer. Raises
    :class:`ConfigError` if there are none, or more than ``longest``."""
    if task == "instruct":
        turns = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if task == "text":  # a document begins so; a chat template writes its own beginning
        ids = [*leading_ids(tokenizer), *ids]
    if not 0 < len(ids) <= longest:
        raise ConfigError(f"sample.prompt has {len(ids)} tokens; it must have 1 to {longest} (data.sequence_length)")
    return ids


@torch.no_grad()
def continue_text(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, ids: list[int], max_new_tokens: int, seed: int
) -> str:
    """The text of ``ids`` and up to ``max_new_tokens`` more (fewer where the model's positions end), drawn at
    temperature 0.8, a function of ``seed``."""
    limit = getattr(model.config, "max_position_embeddings", None) or len(ids) + max_new_tokens
    inputs = torch.tensor([ids], device=model.get_input_embeddings().weight.device)
    torch.manual_seed(seed)
    model.eval()
    output = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=max(1, min(max_new_tokens, limit - len(ids))),
        do_sample=True,
        temperature=0.8,
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(output[0], skip_special_tokens=True)
