"""The learning rate as a function of the step."""

import math


def lr_at(step: int, *, peak: float, warmup_steps: int, max_steps: int, schedule: str, min_lr_ratio: float) -> float:
    """Learning rate of optimizer step ``step`` (from 0): a linear warm-up that reaches ``peak`` in step
    ``warmup_steps``, then ``schedule`` down to ``peak · min_lr_ratio`` in the last step (constant: no decay)."""
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return peak
    done = min(1.0, (step - warmup_steps) / max(1, max_steps - 1 - warmup_steps))
    share = 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1.0 - done
    return peak * (min_lr_ratio + (1 - min_lr_ratio) * share)
