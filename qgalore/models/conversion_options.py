"""What a caller of ``convert()`` may choose, and which choices cannot work."""

from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from .. import combinations
from ..errors import ConfigError
from ..lowrank.subspace.ranks import STEP
from ..lowrank.subspace.sides import PROJ_TYPES
from ..quant.basis import FORMATS
from ..quant.int8 import GROUP_SIZES

ALLOWED = {
    "proj_type": PROJ_TYPES,
    "weight_format": ("int8", "none"),
    "basis_format": FORMATS,
    "group_size": (*GROUP_SIZES, "row"),
    "embeddings": ("full", "int8"),
    "compute": ("bf16", "int8"),
    "convolutions": ("full", "tucker"),
}


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


@dataclass(frozen=True)
class Patterns:
    """``fnmatch`` patterns on full module names. An empty ``include`` takes every name."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def check(self, names: list[str]) -> None:
        """Raise :class:`ConfigError` for a pattern that matches none of ``names``, those of the layers."""
        for key, patterns in (("include", self.include), ("exclude", self.exclude)):
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in names):
                    found = f"{key} pattern {pattern!r} matches no linear layer"
                    raise ConfigError(f"{found}; the layers are named like {', '.join(names[:3])}")

    def reason_to_skip(self, name: str) -> str | None:
        """Why the patterns leave ``name``; None if they take it."""
        if self.include and not matches(name, self.include):
            return "not in include"
        return "in exclude" if matches(name, self.exclude) else None


@dataclass(frozen=True)
class LayerOptions:
    """How one layer is made: the arguments of :func:`convert.convert` that concern a single matrix."""

    rank: int | str | None
    max_rank: int | None
    mean_rank: int | None
    proj_type: str
    weight_format: str
    group_size: int | str
    basis_format: str
    grad_dtype: torch.dtype

    def automatic_ranks(self, side: int) -> tuple[int, int]:
        """(mean, max) of a layer with ``rank="auto"`` whose smaller side is ``side``."""
        most = min(side, self.max_rank or max(STEP, self.mean_rank or 0, side // 4 // STEP * STEP))
        return min(most, self.mean_rank or most), most


def check(options: LayerOptions, *, embeddings: str, compute: str, convolutions: str) -> None:
    """Raise :class:`ConfigError` for a value that is not known, or two that do not go together."""
    given = {"embeddings": embeddings, "compute": compute, "convolutions": convolutions}
    given |= {key: getattr(options, key) for key in ALLOWED if key not in given}
    for key, value in given.items():
        if value not in ALLOWED[key]:
            raise ConfigError(f"{key} is {value!r}; it must be one of {', '.join(map(str, ALLOWED[key]))}")
    _refuse(combinations.integer_products(combinations.ARGUMENTS, compute, options.weight_format, options.group_size))
    _check_ranks(options)
    if options.rank == "auto" and convolutions == "tucker":
        raise ConfigError("rank is 'auto': the projected sides of a convolution have a fixed one; give a number")


def _check_ranks(options: LayerOptions) -> None:
    rank, mean, most = options.rank, options.mean_rank, options.max_rank
    if rank not in (None, "auto") and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ConfigError(f"rank is {rank!r}; it must be a whole number of at least 1, 'auto', or None for full rank")
    for key, value in (("max_rank", most), ("mean_rank", mean)):
        if value is not None and rank != "auto":
            raise ConfigError(f"{key} is {value!r}, and rank is {rank!r}; it goes with rank 'auto' only")
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < STEP):
            raise ConfigError(f"{key} is {value!r}; ranks move by {STEP}: give at least {STEP}, or a rank")
    _refuse(combinations.ordered_ranks(combinations.ARGUMENTS, rank, mean, most))
    _refuse(combinations.automatic_side(combinations.ARGUMENTS, rank, options.proj_type))


def _refuse(message: str | None) -> None:
    if message is not None:
        raise ConfigError(message)
