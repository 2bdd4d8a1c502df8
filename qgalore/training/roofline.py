"""The counts of a configuration's step, and what follows for a card.

A step grows by the same amount with every block. So two small models of a configuration's shape tell of the whole: its
counts and its memory are continued in a straight line.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from .. import config as configuration
from ..config import Config
from ..memory import stand_ins
from ..memory.rehearsal import Step, ids, mask
from ..memory.resident import make_states
from ..models import loading
from ..models.compiling import blocks_of
from ..models.loss import Loss, can_be_chunked, chunked_loss, summed_loss
from ..speed import CARDS, Card, Counts, count, count_forward, parts, seconds
from .model import Vocabulary
from .paper import on_paper, plan_for
from .proposals import changed

VOCABULARY = 32_000  # of a configuration whose tokenizer is yet to be trained


def counts_of(config: Config, vocabulary: Vocabulary) -> tuple[Counts, int]:
    """(counts, tokens) of a step of a resolved configuration that trains a language model, in one process."""
    model, optimizer = _on_paper(config, vocabulary)
    return _count(config, model, optimizer.tensors, **_whole(config)), _tokens(config)


def _on_paper(config: Config, vocabulary: Vocabulary) -> tuple[nn.Module, Any]:
    """Without checkpointing: blocks that run again are counted by themselves."""
    model, optimizer = on_paper(changed(config, {"train.activation_checkpointing": False}), vocabulary)
    return model.train(), optimizer


def _tokens(config: Config) -> int:
    """Of a step."""
    return config.train.micro_batch_size * config.data.sequence_length * config.train.grad_accumulation


def _count(config: Config, model: nn.Module, tensors: list, micro_batches: int, recomputed: bool) -> Counts:
    how = {"micro_batches": micro_batches, "recomputed": recomputed}
    return count(model, tensors, *_on(config, model), **how, stand_in=stand_ins.kernels("cuda"))


def _count_forward(config: Config, model: nn.Module, tensors: list) -> Counts:
    return count_forward(model, tensors, *_on(config, model), stand_in=stand_ins.kernels("cuda"))


def _on(config: Config, model: nn.Module) -> tuple[list[nn.Module], Loss, dict[str, Tensor]]:
    """A model's blocks, its loss, and a micro-batch."""
    loss, train = chunked_loss if can_be_chunked(model) else summed_loss, config.train
    length = config.data.sequence_length
    step = Step(loss=loss, micro_batch_size=train.micro_batch_size, sequence_length=length, masked=False)
    return list(blocks_of(model)), loss, ids(step) | mask(model, step)


def _recomputed(config: Config) -> bool:
    """Whether blocks run again in the backward pass."""
    return config.train.activation_checkpointing is not False


def line_of(config: Config, vocabulary: Vocabulary, total: int) -> str:
    """What a plan of ``total`` bytes says of speed: tokens a second on the smallest cards with room for it, by
    arithmetic. ``config`` is resolved and for one process."""
    if config.memory.streams:
        return "not counted for blocks that are streamed"
    if vocabulary.labels is not None:
        return "not counted for classifiers"
    size = min((card.size for card in CARDS if card.size << 30 >= total), default=None)
    if size is None:
        return "not counted, for no card in the table has room for the plan"
    (counts,), tokens = _continued(config, vocabulary, partial(_count, **_whole(config))), _tokens(config)
    speeds = ((card.name, tokens / seconds(parts(counts, card))) for card in CARDS if card.size == size)
    found = ", ".join(f"{name} {speed:,.0f}" for name, speed in speeds)
    return f"tokens/s by arithmetic, unmeasured: {found}"


def seconds_of_a_token(config: Config, vocabulary: Vocabulary, card: Card) -> tuple[float, float]:
    """What a token more in a step of one process takes on ``card``, forward through the blocks and then to the end of
    the backward pass. What a step takes whatever its tokens are, such as write-backs, is left out."""
    steps = [partial(_count, micro_batches=number, recomputed=_recomputed(config)) for number in (1, 2)]
    once, two, forward = _continued(config, vocabulary, *steps, _count_forward)
    tokens = config.train.micro_batch_size * config.data.sequence_length
    first, whole = (seconds(parts(counts, card)) / tokens for counts in (forward, two + once * -1.0))
    return first, whole - first


def _whole(config: Config) -> dict[str, Any]:
    """The micro-batches of a step, and whether blocks run again."""
    return {"micro_batches": config.train.grad_accumulation, "recomputed": _recomputed(config)}


def _continued(config: Config, vocabulary: Vocabulary, *ways: Callable[..., Counts]) -> list[Counts]:
    """What each of ``ways`` counts with a configuration, a model and its tensors, continued from the model's first one
    and two blocks."""
    model, optimizer = _on_paper(config, vocabulary)
    make_states(optimizer.tensors)  # which only the first of the steps would do otherwise
    depth, found = len(blocks_of(model)), []
    for layers in (2, 1):
        _cut(model, layers)
        left = {id(parameter) for parameter in model.parameters()}
        tensors = [t for t in optimizer.tensors if id(t.leaves()[0]) in left]
        found.append([way(config, model, tensors) for way in ways])
    return [one + (two + one * -1.0) * (depth - 1) for two, one in zip(*found, strict=True)]


def _cut(model: nn.Module, layers: int) -> None:
    """Leave the first ``layers`` blocks of ``model``."""
    first: nn.Module = blocks_of(model)[0]
    for holder in [m for m in model.modules() if isinstance(m, nn.ModuleList) and first in list(m)]:
        del holder[layers:]
    shape: Any = model.config.get_text_config()
    shape.num_hidden_layers = min(layers, shape.num_hidden_layers)


def counts_for_a_card(config: Config) -> tuple[Counts, int]:
    """:func:`counts_of` a configuration as it was read, for a GPU that knows bf16, wherever this runs."""
    resolved = configuration.resolve(config, "cuda", True, 1)
    return counts_of(resolved, Vocabulary(resolved.data.vocab_size or VOCABULARY, None, None))


def expected(name: str, card: Card, efficiency: dict[str, float]) -> tuple[float, float]:
    """(bytes of the planned peak, tokens a second) of the configuration ``name`` on ``card``, whose rates are reached
    to the shares of ``efficiency``. The configuration must start from a shape, not from a folder of weights."""
    config = configuration.resolve(configuration.load(name, []), "cuda", True, 1)
    entries = config.model.overrides.get("vocab_size", config.data.vocab_size)
    vocabulary = Vocabulary(entries, None, None)
    shape = loading.model_config(config.model.config, tokenizer_size=entries, overrides=config.model.overrides)
    found = []
    for layers in (1, 2):
        overrides = {**config.model.overrides, "num_hidden_layers": layers}
        small = changed(config, {"model.overrides": overrides})
        counts, tokens = counts_of(small, vocabulary)
        found.append((counts, plan_for(small, vocabulary, "cuda").total))
    (one, small_peak), (two, peak) = found
    more = shape.num_hidden_layers - 1
    return small_peak + (peak - small_peak) * more, tokens / seconds(
        parts(one + (two + one * -1.0) * more, card, efficiency)
    )
