"""Whether the steps of a run are layer-major: the model is walked once, on a micro-batch of the run's own."""

import torch
from torch import nn

from .. import config as configuration
from ..config import Config
from ..models.loss import Loss
from ..parallel import ALONE, Team
from ..parallel.shards import Gathered
from ..step.activations import Activations
from ..step.blocks import Layout
from ..step.trial import try_walk
from ..step.turns import AlwaysThere, Turns
from .parts import Samples
from .say import say


def try_layer_major(
    config: Config, model: nn.Module, loss: Loss, samples: Samples, device: torch.device, team: Team = ALONE
) -> tuple[Config, Layout | None]:
    """The model's parts, if ``config`` asks for layer-major steps and the model can be walked, in every process of
    ``team``. None otherwise; the configuration that is returned then says batch-major, and a line says why.

    Raises :class:`ConfigError` if the configuration asks for something that batch-major steps cannot do.
    """
    if config.train.order == "batch_major":
        return config, None
    size = min(config.train.micro_batch_size, len(samples))
    batch = {name: value.to(device) for name, value in samples.batch(range(size)).items()}
    was_training = model.training
    trial = try_walk(model.train(), batch, loss)
    model.train(was_training)
    refusing = team.lowest("the trial of a walk", trial.layout is None)
    if refusing is not None:
        trial = team.led_by(refusing).of_first("why a model cannot be walked", lambda: trial)
    if trial.layout is None:
        say("step", f"batch-major: {trial.why}")
        return configuration.batch_major(config, f"{type(model).__name__} cannot be walked: {trial.why}"), None
    say("step", f"layer-major: {trial}")
    return config, trial.layout


def kept_in_walks(config: Config, layout: Layout) -> Activations:
    """What a walk keeps between its two passes: the graphs of all blocks or of some, or their inputs, here or in host
    memory."""
    asked = config.train.activation_checkpointing
    graphs = len(layout) if asked is False else 0 if asked is True or isinstance(asked, str) else asked
    return Activations(where="host" if asked == "offload" else "device", graphs_of_last=graphs)


def turns_of(config: Config, layout: Layout, team: Team) -> Turns:
    """What happens around a block's turn in a walk: its weights are gathered, if processes split them."""
    return Gathered(layout.blocks, team) if config.parallel == "shard" and team.size > 1 else AlwaysThere()
