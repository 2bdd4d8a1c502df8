"""Rules that turn the full gradient of a layer into its update, each in a file of its own."""

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

RULES: dict[str, type[Rule]] = {
    "apollo": Apollo,
    "apollo_mini": ApolloMini,
    "scale": Scale,
    "fira": Fira,
    "muon": Muon,
    "sinkgd": SinkGD,
}

GALORE = "galore"  # not one of the rules here: it needs Δ's gradient alone
NAMES = (GALORE, *RULES)
GALORE_SCALE = 0.25
FULL_GRADIENTS = ("free", "keep")

__all__ = ["GALORE", "NAMES", "RULES", "Rule", "RuleOptions", "check", "check_momentum", "default_scale"]


def default_scale(rule: str) -> float:
    """The published scale of a rule's updates."""
    return GALORE_SCALE if rule == GALORE else RULES[rule].default_scale


def check(rule: str, rank: int | None, stepping: str, full_gradients: str, modules: dict[str, LowRankLinear]) -> None:
    """Raise :class:`ConfigError` for an unknown rule, and for what a rule cannot work with."""
    if rule not in NAMES:
        raise ConfigError(f"rule is {rule!r}; it must be one of {NAMES}")
    if full_gradients not in FULL_GRADIENTS:
        raise ConfigError(f"full_gradients is {full_gradients!r}; it must be one of {FULL_GRADIENTS}")
    if rule == "apollo" and (rank is None or rank < 1):
        raise ConfigError(f"rank is {rank!r}; rule 'apollo' needs the rank of its random projection, at least 1")
    if rule != "apollo" and rank is not None:
        raise ConfigError(
            f"rank is {rank!r}, and rule {rule!r} does not read it: a layer's rank is set by convert; leave it out here"
        )
    if rule == GALORE:
        return
    if free := [name for name, module in modules.items() if module.max_rank is not None]:
        raise ConfigError(
            f"rule {rule!r} needs a fixed rank, and {len(free)} layers were converted with rank='auto', for example "
            f"{free[0]}; convert the model with a number, or use rule='galore'"
        )
    if stepping == "deferred" and full_gradients == "free":  # manual stepping is the caller's to decide
        raise ConfigError(
            f"rule {rule!r} needs the full gradient of every layer in every step, and stepping 'deferred' would keep "
            "all of them at once, as many values as the layers have weights; use stepping='fused', or accept the "
            "memory with full_gradients='keep'"
        )
    idle = [name for name, m in modules.items() if not (m.left is None and m.right is None)]
    if idle and not RULES[rule].uses_basis:
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
