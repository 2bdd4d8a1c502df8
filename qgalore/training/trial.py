"""Whether the steps of a run are layer-major: the model is walked once, on a micro-batch of the run's own."""

import torch
from torch import nn

from .. import config as configuration
from ..config import Config
from ..errors import ConfigError
from ..lowrank.optimizer import LowRankOptimizer
from ..models.loss import Loss
from ..parallel import ALONE, Team
from ..steps.activations import Activations
from ..steps.blocks import Layout
from ..steps.trial import try_walk
from ..steps.turns import AlwaysThere, Turns, gathered
from .parts import Samples, Stepping
from .say import say
from .stepping import BatchMajor, LayerMajor


def try_layer_major(
    config: Config, model: nn.Module, loss: Loss, samples: Samples, device: torch.device, team: Team = ALONE
) -> tuple[Config, Layout | None]:
    """The model's parts, if ``config`` allows layer-major steps and the model can be walked, in every process of
    ``team``. None otherwise; the configuration that is returned then says batch-major. Raises :class:`ConfigError` if
    that cannot do what is asked for."""
    if config.train.order == "batch_major":
        return config, None
    size = min(config.train.micro_batch_size, len(samples))
    batch = {name: value.to(device) for name, value in samples.batch(range(size)).items()}
    was_training = model.training
    # Flex attention that is not compiled would hold the scores of whole rows.
    stance = "default" if config.model.attention == "flex" else "force_eager"
    trial = try_walk(model.train(), batch, loss, stance=stance)
    model.train(was_training)
    refusing = team.lowest("the trial of a walk", trial.layout is None)
    if refusing is not None:
        trial = team.led_by(refusing).of_first("why a model cannot be walked", lambda: trial)
    if trial.layout is None:
        cannot = f"{type(model).__name__} cannot be walked block by block: {trial.why}"
        if config.train.order == "layer_major":
            raise ConfigError(f"train.order is layer_major, but {cannot}. Set train.order=batch_major or auto")
        say("step", f"batch-major: {trial.why}")
        return configuration.batch_major(config, cannot), None
    say("step", f"layer-major: {trial}")
    return config, trial.layout


def order_of(
    config: Config,
    model: nn.Module,
    optimizer: LowRankOptimizer,
    layout: Layout | None,
    how: Stepping,
    turns: Turns | None = None,
) -> BatchMajor | LayerMajor:
    """The order in which a run, or the plan of one, goes through its steps. ``layout``: of a model that is walked.
    ``turns``: what happens around a block's turn, where that is not for the processes to say."""
    if layout is None:
        return BatchMajor(model, optimizer, how)
    turns = turns or turns_of(config, layout, optimizer.team)
    return LayerMajor(model, optimizer, how, layout, kept_in_walks(config, layout), turns)


def kept_in_walks(config: Config, layout: Layout) -> Activations:
    """What a walk keeps between its two passes: the graphs of all blocks or of the last ones, and the inputs of the
    others, here or in host memory."""
    where = "host" if config.train.activation_checkpointing == "offload" else "device"
    return Activations(where=where, graphs_of_last=graphs_kept(config, len(layout)))


def graphs_kept(config: Config, blocks: int) -> int:
    """How many of a model's last ``blocks`` keep their graphs from the forward pass, and so run once."""
    asked = config.train.activation_checkpointing
    if asked is False:
        return blocks
    return min(asked, blocks) if isinstance(asked, int) and asked is not True else 0


def turns_of(config: Config, layout: Layout, team: Team) -> Turns:
    """What happens around a block's turn in a walk: its weights are gathered, if processes split them."""
    return gathered(layout) if config.parallel.over(team.size).splits else AlwaysThere()
