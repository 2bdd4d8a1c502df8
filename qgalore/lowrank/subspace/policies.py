"""When a layer looks for a new subspace: the policies by name.

``overlap``, ``first_vector``, ``signed_cosine``: Q-GaLore's lazy schedule (arXiv 2407.08296, §3.2) on three measures of
  how far a refresh has moved the basis: the subspaces' overlap above chance, |cos| of the first vectors, and their
  cosine with its sign, which is the published test and hangs on the sign that a decomposition happens to return.
``energy``: no refresh until the basis captures less of the gradient than it did (:class:`.schedule.EnergySchedule`).
``fixed``: GaLore's constant gap (arXiv 2403.03507, §4.1).
"""

from typing import Any

from .schedule import EnergySchedule, LazySchedule, Schedule, look_gap, staggered_first_gaps

DECIDING = {  # the figure of a refresh record that stretches the gap, or is reported as its similarity
    "overlap": "overlap_above_chance",
    "first_vector": "first_vector",
    "signed_cosine": "signed_cosine",
    "energy": "overlap_above_chance",
    "fixed": "overlap_above_chance",
}
POLICIES = tuple(DECIDING)
THRESHOLDS = {"overlap": 0.2, "first_vector": 0.4, "signed_cosine": 0.4}  # a policy's own cos_threshold
NEVER = 2.0  # a threshold that no cosine reaches


def make_schedules(policy: str, layers: int, gap: int, stagger: bool, lazy: dict[str, Any]) -> list[Schedule]:
    """A schedule for each of ``layers``. ``lazy``: cos_threshold, gamma_proj, queue_size and max_gap, of which
    ``energy`` reads the last alone and ``fixed`` none. ``stagger``: spread over the gap what follows the first basis.
    """
    interval = look_gap(gap) if policy == "energy" else gap
    gaps = staggered_first_gaps(layers, interval) if stagger else [interval] * layers
    if policy == "energy":
        return [EnergySchedule(gap, first, max_gap=lazy["max_gap"]) for first in gaps]
    if policy == "fixed":
        lazy = {**lazy, "cos_threshold": NEVER}
    return [LazySchedule(gap, first, **lazy) for first in gaps]


def layers_at_once(policy: str, layers: int, gap: int) -> int:
    """How many layers' full gradients a step may need together where the looks are spread evenly."""
    return -(-layers // (look_gap(gap) if policy == "energy" else gap))
