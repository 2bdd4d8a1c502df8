"""How long a run is: its optimizer steps and those of its warm-up, where they are given as epochs and as a share."""

import math
from collections.abc import Iterator
from fractions import Fraction

from .sections import Config
from .train_section import TrainSection


def steps_of(train: TrainSection, samples: int) -> int:
    """The optimizer steps of a run on so many ``samples``, rounded up."""
    if train.epochs is None:
        return train.steps
    drawn = _exactly(train.epochs) * samples
    return max(1, math.ceil(drawn / (train.micro_batch_size * train.grad_accumulation)))


def with_steps(config: Config, samples: int) -> Config:
    """``config`` with its steps and those of its warm-up as numbers, for a run on so many training ``samples``. What
    was asked for stays beside them; :func:`asked` takes the numbers out again."""
    train = config.train
    found = {"max_steps": steps_of(train, samples)}
    if train.warmup_ratio is not None:
        found["warmup_steps"] = math.ceil(_exactly(train.warmup_ratio) * found["max_steps"])
    return config.model_copy(update={"train": train.model_copy(update=found)})


def asked(config: Config) -> Config:
    """``config`` with epochs and a share where they were asked for, without the numbers that these came to."""
    train, derived = config.train, {}
    if train.epochs is not None:
        derived["max_steps"] = None
    if train.warmup_ratio is not None:
        derived["warmup_steps"] = 0
    return config.model_copy(update={"train": train.model_copy(update=derived)}) if derived else config


def _exactly(number: float) -> Fraction:
    """``number`` as it was written: 0.1 is a tenth, so that a tenth of 30 steps is 3 of them and not 4."""
    return Fraction(str(number))


def one_length(config: Config) -> Iterator[str]:
    """What is wrong if not exactly one of the two lengths is given."""
    train = config.train
    if train.max_steps is None and train.epochs is None:
        yield "train: neither train.max_steps nor train.epochs is given; add one, for example train.max_steps=1000"
    if train.max_steps is not None and train.epochs is not None:
        yield (
            f"train: both train.max_steps ({train.max_steps}) and train.epochs ({train.epochs:g}) are given; leave one "
            "out, on the command line with train.epochs=null or train.max_steps=null"
        )


def one_warmup(config: Config) -> Iterator[str]:
    """What is wrong if both lengths of a warm-up are given."""
    train = config.train
    if train.warmup_ratio is not None and train.warmup_steps:
        yield (
            f"train: both train.warmup_steps ({train.warmup_steps}) and train.warmup_ratio ({train.warmup_ratio:g}) "
            "are given; leave one out, on the command line with train.warmup_ratio=null or train.warmup_steps=0"
        )
