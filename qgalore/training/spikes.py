"""When a loss is a spike."""

import math
from collections.abc import Sequence

POLICIES = ("off", "warn", "skip", "rollback")
WINDOW = 100  # losses that a new one is compared with
LEAST = 20  # fewer say too little


def is_spike(losses: Sequence[float], loss: float, threshold: float) -> bool:
    """Whether ``loss`` lies more than ``threshold`` standard deviations above the mean of the last losses (nats).

    The first ``LEAST`` losses are never spikes. A deviation below 1 % of the mean counts as 1 %: a loss that hardly
    varies would otherwise make every wiggle a spike.
    """
    recent = losses[-WINDOW:]
    if len(recent) < LEAST:
        return False
    mean = math.fsum(recent) / len(recent)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in recent) / len(recent))
    return loss > mean + threshold * max(deviation, 0.01 * abs(mean))
