"""Rules that turn the full gradient of a layer into its update, each in a file of its own."""

from .apollo import Apollo
from .apollo_mini import ApolloMini
from .common import Rule, RuleOptions
from .fira import Fira
from .scale import Scale

RULES: dict[str, type[Rule]] = {
    "apollo": Apollo,
    "apollo_mini": ApolloMini,
    "scale": Scale,
    "fira": Fira,
}

__all__ = ["RULES", "Rule", "RuleOptions"]
