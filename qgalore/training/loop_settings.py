"""What the loop is given, read from a configuration."""

from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from ..config import Config
from ..data.mixing import MixedOrder, Mixture
from ..data.order import SampleOrder
from ..evaluation.loss import Losses, evaluate_sets
from ..memory.plan import Plan
from ..models.loss import Loss, target_tokens
from ..parallel import ALONE, Team
from ..quant.counter import derive_key
from . import classification
from .data import Data as BuiltData
from .learning_rate import lr_at
from .limits import Limit
from .parts import Data, Evaluating, Faults, Saving, Stepping


def of_data(
    config: Config,
    data: BuiltData,
    examples: classification.LabelledData | None,
    loss: Loss,
    team: Team,
    losses: Losses,
) -> Data:
    """What is trained on and held out. ``losses``: how the held-out batches go through the model."""
    order_for = cache(partial(sample_order, data.train, config.run.seed))
    if examples is not None:
        return classification.loop_data(config, examples, order_for, losses)
    # A pass that gathers weights must be the same in all processes, so there each evaluates all of the data.
    team = ALONE if config.parallel.over(team.size).splits else team
    looking = partial(evaluate_sets, summed_loss=loss, target_tokens=target_tokens, team=team, losses=losses)
    return Data(data.train, data.valid, order_for, target_tokens, looking)


def sample_order(train: Mixture, seed: int, rollbacks: int = 0) -> MixedOrder:
    """The order of the training samples in a run, after as many ``rollbacks``. The first source has the order that it
    has alone."""
    keys = [(seed, rollbacks), *((seed, rollbacks, place) for place in range(1, len(train.sources)))]
    seeds = [derive_key(*key)[0] & 0xFFFFFFFF for key in keys]
    orders = [SampleOrder(len(one), its) for one, its in zip(train.sources, seeds, strict=True)]
    return MixedOrder(orders, train.weights, train.names)


def of_steps(config: Config) -> Stepping:
    train = config.train
    schedule = {"peak": train.lr, "warmup_steps": train.warmup_steps, "max_steps": train.steps}
    return Stepping(
        lr_at=partial(lr_at, **schedule, schedule=train.lr_schedule, min_lr_ratio=train.min_lr_ratio),
        seed=config.run.seed,
        max_steps=train.steps,
        micro_batch_size=train.micro_batch_size,
        grad_accumulation=train.grad_accumulation,
        clip_grad_norm=train.clip_grad_norm,
    )


def of_evaluations(config: Config) -> Evaluating:
    train = config.train
    return Evaluating(train.eval_every, train.eval_batches, train.early_stopping)


def of_checkpoints(
    config: Config, folder: Path, run_state: dict[str, Any], planned: Plan, device: torch.device
) -> Saving:
    train = config.train
    return Saving(
        folder,
        run_state,
        save_every=train.save_every,
        keep_last=train.keep_last,
        keep_every=train.keep_every,
        keep_best=train.keep_best,
        for_rollback=train.loss_spike == "rollback",
        room=lambda: Limit.of(config, device).room_for_copy(planned, device),
    )


def of_faults(config: Config, planned: Plan) -> Faults:
    train = config.train
    return Faults(train.max_skipped_in_a_row, train.loss_spike, train.spike_threshold, plan=str(planned))
