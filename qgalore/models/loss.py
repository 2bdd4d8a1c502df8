"""The training loss: cross entropy summed over target tokens, so that any split into micro-batches adds up."""

import torch
from torch import Tensor, nn

from ..errors import ConfigError

IGNORED = -100


def target_tokens(batch: dict[str, Tensor]) -> int:
    """How many labels of ``batch`` count."""
    return int((batch["labels"] != IGNORED).sum())


def summed_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross entropy in nats, in fp32, summed over the labels (B, L) that count; labels are already shifted.

    ``position_ids`` restart where documents do, which transformers turns into attention within documents.
    """
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    return nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), batch["labels"].flatten(), ignore_index=IGNORED, reduction="sum"
    )


@torch.no_grad()
def check_isolation(model: nn.Module, length: int = 8) -> None:
    """Raise :class:`ConfigError` if tokens of one document change the logits of the next in a packed row.

    Not every architecture reads document borders off ``position_ids``, so it is tried: the same second document behind
    two different first ones, with positions that restart, against the same with positions that run on.
    """
    was_training = model.training
    model.eval()
    device = model.get_input_embeddings().weight.device
    half = torch.arange(length, device=device)
    rows = torch.stack((torch.cat((half, half)), torch.cat((half.flip(0), half))))

    def difference(positions: Tensor) -> float:
        logits = model(input_ids=rows, position_ids=positions.repeat(2, 1), use_cache=False).logits
        return float((logits[0, length:].float() - logits[1, length:].float()).abs().max())

    isolated, joined = difference(torch.cat((half, half))), difference(torch.arange(2 * length, device=device))
    model.train(was_training)
    if isolated > 0.1 * joined:
        raise ConfigError(
            f"{type(model).__name__} lets a token see earlier documents in its row although position_ids restart; set "
            "data.document_attention=joined to train it that way knowingly"
        )
