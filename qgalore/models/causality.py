"""Whether a model may be trained to predict the next token at all."""

import torch
from torch import nn

from ..errors import ConfigError


@torch.no_grad()
def check_causal(model: nn.Module) -> None:
    """Raise :class:`ConfigError` if a token's logits depend on the tokens after it, as in an encoder such as BERT."""
    device = model.get_input_embeddings().weight.device
    ids = torch.zeros(1, 4, dtype=torch.int64, device=device)
    other = ids.clone()
    other[0, -1] = model.get_input_embeddings().weight.shape[0] - 1
    before, after = (model(input_ids=tokens, use_cache=False).logits[0, :3].float() for tokens in (ids, other))
    if not torch.allclose(before, after, rtol=0, atol=1e-3 * float(before.abs().max())):
        raise ConfigError(
            f"{type(model).__name__} lets a token see the tokens after it, so it would learn to copy them and not to "
            "predict them. Start from a decoder, or use this model with data.task=classify"
        )
