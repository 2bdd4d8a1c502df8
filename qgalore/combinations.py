"""What goes together, stated once for both who ask: a configuration, and a call of ``convert()`` or ``optimizer()``.

Each conflict is a function that returns a message, or None where all is well. A :class:`Door` says how whoever asks
calls its choices. Conflicts between keys that the library does not have are in ``config/incompatible.py``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

GALORE = "galore"  # the rule that needs Δ's gradient alone


@dataclass(frozen=True)
class RuleFacts:
    """``scale``: the published one of its updates; ``uses_basis``: whether it works in stored bases; ``reads``: the
    other low-rank keys that it reads."""

    scale: float
    uses_basis: bool
    reads: tuple[str, ...] = ()


RULES = {
    GALORE: RuleFacts(0.25, True),
    "apollo": RuleFacts(1.0, False, ("rank", "update_proj_gap")),
    "apollo_mini": RuleFacts(128.0**0.5, False, ("update_proj_gap",)),
    "scale": RuleFacts(1.0, False),
    "fira": RuleFacts(1.0, True),
    "muon": RuleFacts(1.0, False, ("momentum", "mu")),
    "sinkgd": RuleFacts(1.0, False),
}


@dataclass(frozen=True)
class Door:
    """How choices are called: by ``keys`` in a configuration, and without any by the names of arguments."""

    keys: Mapping[str, str] = field(default_factory=dict)

    def name(self, argument: str) -> str:
        return self.keys.get(argument, argument)

    def said(self, argument: str, value: Any) -> str:
        """A choice as its user writes it."""
        return f"{self.keys[argument]}: {value}" if argument in self.keys else f"{argument}={value!r}"


ARGUMENTS = Door()


def integer_products(
    door: Door, compute: str, weight_format: str, group_size: int | str, whose: str = "these"
) -> str | None:
    """Products of integers need int8 weights with one scale a row. ``whose``: what to call weights that are not."""
    if compute != "int8":
        return None
    asked = door.said("compute", "int8")
    if weight_format != "int8":
        remedy = f"{door.said('weight_format', 'int8')}, or " if whose == "these" else ""  # a method's own cannot be
        return f"{asked} is for trained int8 weights, and {whose} are not; set {remedy}{door.said('compute', 'bf16')}"
    if group_size != "row":
        return f"{asked} needs one scale for a row of weights; set {door.said('group_size', 'row')}"
    return None


def automatic_side(door: Door, rank: Any, proj_type: str) -> str | None:
    """An automatic rank goes by the spectrum of one side."""
    if rank != "auto" or proj_type != "full":
        return None
    asked = f"{door.said('proj_type', 'full')} has two bases, and {door.said('rank', 'auto')}"
    return f"{asked} goes by one spectrum; use std, left or right"


def ordered_ranks(door: Door, rank: Any, mean_rank: int | None, max_rank: int | None) -> str | None:
    """The mean of automatic ranks is no more than their limit."""
    if rank != "auto" or mean_rank is None or max_rank is None or mean_rank <= max_rank:
        return None
    return f"{door.said('mean_rank', mean_rank)} is above max_rank, {max_rank}; lower it or raise that"


def automatic_rule(door: Door, automatic: bool, rule: str, where: str = "") -> str | None:
    """Only galore changes ranks. ``where``: which layers have an automatic one, if that is known."""
    if not automatic or rule == GALORE:
        return None
    given = f"{door.said('rank', 'auto')} was given{where}, and only rule galore moves ranks"
    return f"{given}; rule {rule} needs a number, which is a fixed rank; give one, or use {door.said('rule', GALORE)}"


def projection_rank(door: Door, rule: str, rank: Any) -> str | None:
    """APOLLO's random projection has a rank of its own."""
    if rule != "apollo" or (isinstance(rank, int) and rank >= 1) or rank == "auto":  # automatic_rule refuses that
        return None
    return f"{door.name('rank')}: rule apollo needs the rank of its random projection; give a number of at least 1"


def whole_gradients(
    door: Door, rule: str, full_gradients: str, asked: list[str], *, clips: bool = False, walks: bool = False
) -> str | None:
    """A rule that needs full gradients cannot wait with them, unless their memory is accepted. ``asked``: the choices
    that make it wait, as their user writes them. ``clips``: a global norm is among them. ``walks``: the steps go block
    by block, where only such a norm waits."""
    if rule == GALORE or full_gradients != "free" or not asked:
        return None
    remedies = [f"accept that with {door.said('full_gradients', 'keep')}"]
    if clips:
        remedies.append(f"limit each matrix's update by itself with {door.name('clip_update_rms')}")
    if not walks:
        remedies.append(f"use one backward pass a step without clipping, as {door.said('stepping', 'fused')} does")
        if door.keys and not clips:
            remedies.append(f"use {door.said('order', 'auto')}, which walks a model block by block where it can")
    return (
        f"{' and '.join(asked)}: rule {rule} needs full gradients, and would keep those of all layers at once until "
        "the step, 4 bytes (2 in bfloat16) for each of their weights, 24 GiB for a 7B model; "
        f"{', '.join(remedies[:-1])}{', or ' if len(remedies) > 1 else ''}{remedies[-1]}"
    )


def limited_updates(door: Door, rule: str | None, limit: float) -> str | None:
    """Only updates that are made from full gradients are limited one by one. ``rule`` None: a method without one."""
    if not limit or rule not in (GALORE, None):
        return None
    here = "with a method that has no rule" if rule is None else f"with rule {rule}"
    why = "only the updates of rules on full gradients are limited one by one"
    asked = f"{door.name('clip_update_rms')} is {limit:g}; it must be 0 {here}, since {why}"
    return f"{asked}. Leave the key out and clip the global norm instead"


def gaps(door: Door, max_gap: int | None, update_proj_gap: int) -> str | None:
    """Gaps begin at ``update_proj_gap`` and grow up to ``max_gap``."""
    if max_gap is None or max_gap >= update_proj_gap:
        return None
    found = f"{door.said('max_gap', max_gap)} is below {door.name('update_proj_gap')}, {update_proj_gap}"
    return f"{found}, where gaps begin; raise it or lower that"
