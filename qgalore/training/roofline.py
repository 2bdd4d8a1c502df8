"""The counts of a configuration's step, and what follows for a card.

A step grows by the same amount with every block. So two small models of a configuration's shape tell of the whole: its
counts and its memory are continued in a straight line.
"""

from .. import config as configuration
from ..config import Config
from ..memory import stand_ins
from ..memory.rehearsal import Step, ids, mask
from ..models import loading
from ..models.compiling import blocks_of
from ..models.loss import can_be_chunked, chunked_loss, summed_loss
from ..speed import Card, Counts, count, parts, seconds
from .model import Vocabulary
from .paper import on_paper, plan_for
from .proposals import changed

VOCABULARY = 32_000  # of a configuration whose tokenizer is yet to be trained


def counts_of(config: Config, vocabulary: Vocabulary) -> tuple[Counts, int]:
    """(counts, tokens) of a step of a resolved configuration that trains a language model, in one process."""
    recomputed = config.train.activation_checkpointing is not False
    whole = changed(config, {"train.activation_checkpointing": False})
    model, optimizer = on_paper(whole, vocabulary)
    model.train()
    loss = chunked_loss if can_be_chunked(model) else summed_loss
    train, length = config.train, config.data.sequence_length
    step = Step(loss=loss, micro_batch_size=train.micro_batch_size, sequence_length=length, masked=False)
    how = {"micro_batches": train.grad_accumulation, "recomputed": recomputed, "stand_in": stand_ins.kernels("cuda")}
    found = count(model, optimizer.tensors, list(blocks_of(model)), loss, ids(step) | mask(model, step), **how)
    return found, train.micro_batch_size * length * train.grad_accumulation


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
