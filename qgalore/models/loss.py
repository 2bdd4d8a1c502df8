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
def check_isolation(model: nn.Module, sequence_length: int) -> None:
    """Raise :class:`ConfigError` if tokens of one document change the logits of the next in a packed row.

    Not every architecture reads document borders off ``position_ids``, so it is tried: the same second document behind
    two different first ones, with positions that restart, against the same with positions that run on.
    """
    was_training = model.training
    model.eval()
    length = min(8, sequence_length // 2)
    if length < 2:
        return  # no room for two documents of two tokens
    device = model.get_input_embeddings().weight.device
    half = torch.arange(length, device=device)
    rows = torch.stack((torch.cat((half, half)), torch.cat((half.flip(0), half))))

    def difference(positions: Tensor) -> float:
        logits = model(input_ids=rows, position_ids=positions.repeat(2, 1), use_cache=False).logits
        return float((logits[0, length:].float() - logits[1, length:].float()).abs().max())

    try:
        isolated, joined = difference(torch.cat((half, half))), difference(torch.arange(2 * length, device=device))
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise ConfigError(f"{type(model).__name__} fails in a trial forward pass: {error}") from error
    model.train(was_training)
    if isolated > 0.1 * joined:
        raise ConfigError(
            f"{type(model).__name__} lets a token see earlier documents in its row although position_ids restart; set "
            "data.document_attention=joined to train it that way knowingly"
        )


@torch.no_grad()
def uncalled_layers(model: nn.Module, kind: type[nn.Module]) -> list[str]:
    """Names of the layers of type ``kind`` that a forward pass over two tokens does not call. Such a layer trains only
    if other inputs reach it (a mixture's expert); one whose ``weight`` the model reads directly never will.

    Raises :class:`ConfigError` if the model cannot run with its layers replaced.
    """
    names = {module: name for name, module in model.named_modules() if isinstance(module, kind)}
    called = set()
    hooks = [module.register_forward_hook(lambda module, *_: called.add(module)) for module in names]
    try:
        model(input_ids=torch.tensor([[0, 1]], device=model.get_input_embeddings().weight.device), use_cache=False)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise ConfigError(
            f"{type(model).__name__} does not run with its linear layers converted ({error}); it probably reads the "
            "weight of some of them directly: name those in lowrank.exclude"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return [name for module, name in names.items() if module not in called]
