"""The training loss: cross entropy summed over target tokens, so that any split into micro-batches adds up.

Two ways to the same value: from all the logits, or in blocks of the vocabulary (``lowrank.layers.head``), which
never holds the tokens × vocabulary logits but is right only for a model that leaves its head's output as it is.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..data.documents import Documents
from ..errors import ConfigError
from ..lowrank.layers import head as chunked
from ..lowrank.layers.experts import Experts
from ..parallel import apart
from .attention import BY_DOCUMENT, implementation, takes_documents

IGNORED = -100
Loss = Callable[[nn.Module, dict[str, Tensor]], Tensor]


def target_tokens(batch: dict[str, Tensor]) -> int:
    """How many labels of ``batch`` count."""
    return int((batch["labels"] != IGNORED).sum())


def balance_weight(model: nn.Module) -> float:
    """The weight of the load-balancing loss that the model's configuration asks for; 0 without one."""
    config = model.config.get_text_config()
    asked = getattr(config, "output_router_logits", False)
    return float(getattr(config, "router_aux_loss_coef", 0.0)) if asked else 0.0


def _inputs(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Any]:
    apart = ("labels", "documents")
    inputs = {**{name: value for name, value in batch.items() if name not in apart}, "use_cache": False}
    if "documents" in batch and takes_documents(model):
        inputs["attention_mask"] = batch["documents"]
    if balance_weight(model):  # in training alone; and routers on the meta device choose nothing
        inputs["output_router_logits"] = model.training and not batch["input_ids"].is_meta
    return inputs


def balance(router_logits: tuple[Tensor, ...], chosen: int) -> Tensor:
    """The load-balancing loss of Switch Transformers (arXiv 2101.03961, equations 4 to 6) as transformers takes it:
    E · Σ_e f_e p_e over the tokens of all layers together, f_e the share of tokens that expert e is among the
    ``chosen`` of, p_e its mean probability. ``router_logits``: (tokens, E) for each layer. fp32; at least ``chosen``
    when both are even."""
    probabilities = torch.cat([layer.float().softmax(-1) for layer in router_logits])
    experts = probabilities.shape[1]
    routed = Experts.rows_of_each(probabilities.topk(chosen).indices.flatten(), experts) / len(probabilities)
    return experts * (routed * probabilities.mean(0)).sum()


def _balanced(model: nn.Module, batch: dict[str, Tensor], loss: Tensor, output: Any) -> Tensor:
    """``loss``, a sum over the batch's targets, with as many times the load-balancing loss where it is asked for."""
    weight = balance_weight(model)
    if not weight or getattr(output, "router_logits", None) is None:
        return loss
    chosen = model.config.get_text_config().num_experts_per_tok
    return loss + weight * target_tokens(batch) * balance(output.router_logits, chosen).to(loss.device)


def summed_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross entropy in nats, in fp32, summed over the labels (B, L) that count, from all the logits at once; labels
    are already shifted.

    ``position_ids`` restart where documents do, which transformers turns into attention within documents. All of the
    batch but its labels goes to the model. In training a mixture whose configuration sets ``output_router_logits`` adds
    its load-balancing loss, ``router_aux_loss_coef`` for each target.
    """
    output = model(**_inputs(model, batch))
    loss = nn.functional.cross_entropy(
        output.logits.flatten(0, 1).float(), batch["labels"].flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return _balanced(model, batch, loss, output)


def chunked_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """:func:`summed_loss` for a model that :func:`head_is_plain` approves: decoder, then head block by block."""
    output, head = model.get_decoder()(**_inputs(model, batch)), model.get_output_embeddings()
    apart.gather_of(head)  # which is not called
    loss = chunked.chunked_cross_entropy(output[0].flatten(0, 1), head, batch["labels"].flatten(), ignored=IGNORED)
    return _balanced(model, batch, loss, output)


def choose_loss(model: nn.Module) -> Loss:
    """:func:`chunked_loss` where it is right for ``model``, else :func:`summed_loss`: compare to say which it is."""
    return chunked_loss if head_is_plain(model) else summed_loss


def can_be_chunked(model: nn.Module) -> bool:
    """Whether ``model`` has a decoder and a head that :func:`chunked_loss` can take apart, as far as shapes tell."""
    return chunked.accepts(model.get_output_embeddings()) and model.get_decoder() is not model


@torch.no_grad()
def head_is_plain(model: nn.Module) -> bool:
    """Whether ``model``'s logits are its head applied to its decoder's output, and nothing else, found by trying.

    Gemma 2 caps logits softly, Cohere and Granite scale them, some models scale what enters the head. Such changes may
    be lost in rounding at initialisation, so the trial puts large numbers in place of the head's output, and expects to
    get exactly these back. Then the two losses must agree on a few tokens. A model on the meta device has no numbers:
    there, head and decoder must hand on the same memory, unwritten.
    """
    head, decoder = model.get_output_embeddings(), model.get_decoder()
    if not can_be_chunked(model):
        return False
    device = model.get_input_embeddings().weight.device
    ids = torch.arange(min(8, head.weight.shape[0]), device=device).unsqueeze(0)
    batch = {"input_ids": ids, "position_ids": torch.arange(ids.shape[1], device=device).unsqueeze(0), "labels": ids}
    if ids.is_meta:  # positions have no values there from which a mask could be made
        batch["attention_mask"] = torch.ones(1, 1, *ids.shape[1:], *ids.shape[1:], dtype=torch.bool, device=device)
    was_training = model.training
    model.eval()
    try:
        if not _passes_unchanged(model, head, decoder, batch):
            return False
        if ids.is_meta:
            return True
        whole, blocks = float(summed_loss(model, batch)), float(chunked_loss(model, batch))
    except (TypeError, ValueError, AttributeError, KeyError):  # a decoder that wants other arguments, say
        return False
    finally:
        model.train(was_training)
    return abs(whole - blocks) <= 1e-3 * abs(whole)  # the same logits, in a product of another shape


def _passes_unchanged(model: nn.Module, head: nn.Module, decoder: nn.Module, batch: dict[str, Tensor]) -> bool:
    """Whether the head gets the decoder's output as it is, and ``model`` returns the head's output as it is."""
    seen: dict[str, Tensor] = {}
    versions: dict[str, int] = {}

    def note(name: str, tensor: Tensor) -> Tensor:
        seen[name], versions[name] = tensor, tensor._version
        return tensor

    def swap(_, inputs: tuple, output: Tensor) -> Tensor:
        note("input", inputs[0])
        if output.is_meta:
            return note("output", output)
        values = torch.linspace(-100, 100, output.numel(), device=output.device)
        return note("output", values.view_as(output).to(output))

    def watch(_, inputs: tuple, output) -> None:
        note("hidden", output[0])

    hooks = [decoder.register_forward_hook(watch)]
    hooks.append(head.register_forward_hook(swap))
    try:
        logits = model(**_inputs(model, batch)).logits
    finally:
        for hook in hooks:
            hook.remove()
    if seen.keys() != {"hidden", "input", "output"}:
        return False
    if any(tensor._version != versions[name] for name, tensor in seen.items()):
        return False
    return _same(seen["input"], seen["hidden"]) and _same(logits, seen["output"])


def _same(one: Tensor, other: Tensor) -> bool:
    """Equal in value, or on the meta device in memory."""
    if one.is_meta:
        places = [(t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride()) for t in (one, other)]
        return places[0] == places[1]
    return torch.equal(one.float(), other.float())


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

    def difference(positions: Tensor, lengths: tuple[int, ...]) -> float:
        apart = {"attention_mask": Documents([lengths] * 2)} if implementation(model) == BY_DOCUMENT else {}
        logits = model(input_ids=rows, position_ids=positions.repeat(2, 1), use_cache=False, **apart).logits
        return float((logits[0, length:].float() - logits[1, length:].float()).abs().max())

    try:
        isolated = difference(torch.cat((half, half)), (length, length))
        joined = difference(torch.arange(2 * length, device=device), (2 * length,))
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
    """Names of the layers of type ``kind`` that a forward pass over two tokens does not call: the model may read their
    ``weight`` directly, and then they never train. Raises :class:`ConfigError` if it cannot run with its layers
    replaced."""
    waiting = {part for module in model.modules() if isinstance(module, Experts) for part in module.modules()}
    names = {m: name for name, m in model.named_modules() if isinstance(m, kind) and m not in waiting}
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
