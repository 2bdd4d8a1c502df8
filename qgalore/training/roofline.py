"""The counts of a configuration's step."""

from .. import config as configuration
from ..config import Config
from ..memory import plan, stand_ins
from ..models.compiling import blocks_of
from ..models.loss import can_be_chunked, chunked_loss, summed_loss
from ..speed import Counts, count
from .fit import _changed, on_paper
from .model import Vocabulary

VOCABULARY = 32_000  # of a configuration whose tokenizer is yet to be trained


def counts_of(config: Config, vocabulary: Vocabulary) -> tuple[Counts, int]:
    """(counts, tokens) of a step of a resolved configuration that trains a language model, in one process."""
    recomputed = config.train.activation_checkpointing is not False
    whole = _changed(config, {"train.activation_checkpointing": False})
    model, tensors = on_paper(whole, vocabulary)
    model.train()
    loss = chunked_loss if can_be_chunked(model) else summed_loss
    train, length = config.train, config.data.sequence_length
    step = plan.Step(
        loss=loss, micro_batch_size=train.micro_batch_size, sequence_length=length, fused=False, masked=False
    )
    how = {"micro_batches": train.grad_accumulation, "recomputed": recomputed, "stand_in": stand_ins.kernels("cuda")}
    found = count(model, tensors, list(blocks_of(model)), loss, plan.example(model, step), **how)
    return found, train.micro_batch_size * length * train.grad_accumulation


def counts_for_a_card(config: Config) -> tuple[Counts, int]:
    """:func:`counts_of` a configuration as it was read, for a GPU that knows bf16, wherever this runs."""
    resolved = configuration.resolve(config, "cuda", True, 1)
    return counts_of(resolved, Vocabulary(resolved.data.vocab_size or VOCABULARY, None, None))
