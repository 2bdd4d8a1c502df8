"""What share of a step's arithmetic Muon's orthogonalisation takes, counted from the shapes of a model's layers.

Orthogonalising costs the same however many tokens a step has, and everything else grows with them. For a square m × m
matrix and T tokens it is 5 m / T of the forward and backward pass. So this rule is for steps of many tokens.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from torch import nn

from ..lowrank.layers.embedding import LowRankEmbedding
from ..lowrank.layers.experts import Experts
from ..lowrank.layers.linear import LowRankLinear
from ..lowrank.rules import fused, orthogonal
from ..models.compiling import blocks_of

LIMIT = 0.1  # the share below which it hardly counts


@dataclass(frozen=True)
class Matrix:
    """A weight (``rows``, ``columns``), the share of all tokens that it is multiplied with, and the rows of each part
    of it that is orthogonalised by itself in a step: one of all rows if None, and no part if empty."""

    rows: int
    columns: int
    tokens: float = 1.0
    parts: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Work:
    """Floating-point operations of a step: ``fixed`` of all orthogonalisations, ``per_token`` of all else."""

    fixed: float
    per_token: float

    def share(self, tokens: float) -> float:
        """The orthogonalisations' part of a step of so many ``tokens``, in [0, 1]."""
        return self.fixed / (self.fixed + self.per_token * tokens)

    def tokens_for(self, share: float) -> float:
        """The tokens of a step in which that part is ``share``; with more tokens it is less."""
        return self.fixed * (1.0 - share) / (share * self.per_token)


def count(matrices: Iterable[Matrix], recomputed: float) -> Work:
    """The work of a step. A token takes 2 operations for each value of a weight in the forward pass, 4 in the backward
    pass, and 2 more in the share of blocks that are ``recomputed``."""
    found = list(matrices)
    fixed = sum(orthogonal.flop(rows, m.columns) for m in found for rows in ((m.rows,) if m.parts is None else m.parts))
    each = 6.0 + 2.0 * recomputed
    return Work(fixed, sum(each * m.rows * m.columns * m.tokens for m in found))


def experts_of_a_token(model: nn.Module) -> int | None:
    """How many experts of a mixture a token takes; None if ``model`` is no mixture."""
    config = getattr(model, "config", None)
    return None if config is None else getattr(config.get_text_config(), "num_experts_per_tok", None)


def matrices(model: nn.Module, chosen: int | None = None) -> list[Matrix]:
    """The matrices of a converted ``model``, or of a part of one. ``chosen``: see :func:`experts_of_a_token`."""
    shares = {}
    for module in model.modules():
        if isinstance(module, Experts):
            layers = [*module.gate_up_proj, *module.down_proj]
            shares |= {layer: (chosen or 1) / len(module.down_proj) for layer in layers}
    found, config = [], getattr(model, "config", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | LowRankLinear):
            tokens = 0.0 if isinstance(module, LowRankEmbedding) else shares.get(module, 1.0)
            rows, columns = module.weight.shape
            parts = fused.rows_of_parts(name, rows, config) if isinstance(module, LowRankLinear) else ()
            found.append(Matrix(rows, columns, tokens, parts))
    return found


def of_training(model: nn.Module, rules: Collection[str | None]) -> Work | None:
    """The work of a step of ``model`` in training, whose layers step by ``rules``; None if none orthogonalises."""
    if "muon" not in rules:
        return None
    return count(matrices(model, experts_of_a_token(model)), recomputed(model))


def recomputed(model: nn.Module) -> float:
    """The share of a model's blocks that run again in the backward pass, as checkpointing has marked them."""
    blocks = blocks_of(model) or [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    return sum(bool(getattr(block, "gradient_checkpointing", False)) for block in blocks) / max(1, len(blocks))


def line(work: Work, tokens: int) -> str:
    enough = work.tokens_for(LIMIT)
    now = f"orthogonalisation is {work.share(tokens):.1%} of a step's arithmetic at {tokens:,} tokens a step"
    return f"{now}; it is below {LIMIT:.0%} from {enough:,.0f} tokens on"
