"""Rules that turn the full gradient of a layer into its update, each in a file of its own."""

from ... import combinations
from ...combinations import ARGUMENTS, GALORE
from ...errors import ConfigError
from ...quant.momentum import FORMATS
from ..layers.embedding import LowRankEmbedding
from ..layers.linear import LowRankLinear
from .apollo import Apollo
from .apollo_mini import ApolloMini
from .common import Rule, RuleOptions
from .fira import Fira
from .muon import Muon
from .scale import Scale
from .sinkgd import SinkGD

RULES: dict[str, type[Rule]] = {rule.name: rule for rule in (Apollo, ApolloMini, Scale, Fira, Muon, SinkGD)}

NAMES = (GALORE, *RULES)
FULL_GRADIENTS = ("free", "keep")

__all__ = ["GALORE", "NAMES", "RULES", "Rule", "RuleOptions", "check", "check_momentum", "default_scale"]


def default_scale(rule: str) -> float:
    """The published scale of a rule's updates."""
    return combinations.RULES[rule].scale


def check(rule: str, rank: int | None, stepping: str, full_gradients: str, modules: dict[str, LowRankLinear]) -> None:
    """Raise :class:`ConfigError` for an unknown rule, and for what a rule cannot work with."""
    if rule not in NAMES:
        raise ConfigError(f"rule is {rule!r}; it must be one of {NAMES}")
    if full_gradients not in FULL_GRADIENTS:
        raise ConfigError(f"full_gradients is {full_gradients!r}; it must be one of {FULL_GRADIENTS}")
    if rule != "apollo" and rank is not None:
        raise ConfigError(
            f"rank is {rank!r}, and rule {rule!r} does not read it: a layer's rank is set by convert; leave it out here"
        )
    free = [name for name, module in modules.items() if module.max_rank is not None]
    where = f" to convert for {len(free)} layers, for example {free[0]}" if free else ""
    waiting = [ARGUMENTS.said("stepping", stepping)] if stepping == "deferred" else []  # manual: the caller decides
    for message in (
        combinations.projection_rank(ARGUMENTS, rule, rank),
        combinations.automatic_rule(ARGUMENTS, bool(free), rule, where),
        combinations.whole_gradients(ARGUMENTS, rule, full_gradients, waiting),
    ):
        if message is not None:
            raise ConfigError(message)
    if rule == GALORE:
        return
    idle = [name for name, m in modules.items() if not (m.left is None and m.right is None)]
    if idle and not combinations.RULES[rule].uses_basis:
        raise ConfigError(
            f"rule {rule!r} uses no stored basis, but {len(idle)} layers have one, for example {idle[0]}; convert the "
            "model with rank=None, which stores none"
        )


def check_momentum(rule: str, momentum: str | None, mu: float | None, modules: dict[str, LowRankLinear]) -> None:
    """Raise :class:`ConfigError` for a momentum that ``rule`` has not or that cannot be kept, None being its default;
    print a note where Muon meets a weight that it was not made for."""
    given = {name: value for name, value in (("momentum", momentum), ("mu", mu)) if value is not None}
    if rule != "muon":
        for name, value in given.items():
            raise ConfigError(
                f"{name} is {value!r}, and rule {rule!r} does not read it; leave it out, or use rule='muon'"
            )
        return
    if momentum is not None and momentum not in FORMATS:
        raise ConfigError(f"momentum is {momentum!r}; it must be one of {FORMATS}")
    if mu is not None and not 0 <= mu < 1:
        raise ConfigError(f"mu is {mu!r}; it must be at least 0 and below 1")
    if found := [name for name, module in modules.items() if isinstance(module, LowRankEmbedding)]:
        print(
            f"note: rule muon orthogonalises the int8 embedding {found[0]} too, and Muon is published for hidden "
            "matrices alone; full embeddings are trained by Adam",
            flush=True,
        )
