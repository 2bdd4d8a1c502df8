"""A pretrained model with more rows of its vocabulary than its files have.

The embedding, an untied head and its bias get the new rows. Each begins as the mean of the rows that there were, in
fp32; those stay as they are, bit for bit. What grows is not listed: it is whatever has another number of rows when the
model is built with a larger vocabulary.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from ..errors import ConfigError
from ..quant.int8 import quantize
from .overriding import differing_tensors
from .packed import Packed
from .streaming import Rows, Source, row_tiles


def rows_of(config: PretrainedConfig) -> int:
    """How many tokens a model of ``config`` has rows for."""
    return config.get_text_config().vocab_size


def resized(config: PretrainedConfig, rows: int) -> PretrainedConfig:
    """A copy of ``config`` with so many rows in its vocabulary."""
    found, before = deepcopy(config), rows_of(config)
    for part in (found, found.get_text_config()):
        if getattr(part, "vocab_size", None) == before:
            part.vocab_size = rows
        if (getattr(part, "pad_token_id", None) or 0) >= rows:  # an added token, and the model is made smaller
            part.pad_token_id = None
    return found


def grown_names(before: nn.Module, after: nn.Module) -> list[str]:
    """The parameters that have more rows in ``after``, the model ``before`` with a larger vocabulary; tied ones once.
    Raises :class:`ConfigError` if anything else differs, for which no values are known."""
    old, new = dict(before.named_parameters()), dict(after.named_parameters())
    grown = [n for n, p in old.items() if n in new and p.shape[1:] == new[n].shape[1:] and len(p) < len(new[n])]
    if other := [line for line in differing_tensors(before, after) if line.split(" ")[0] not in grown]:
        raise ConfigError(
            f"the vocabulary of {type(before).__name__} cannot grow: {other[0]}, and for that no values are known. "
            "Leave data.added_tokens and model.grow_vocabulary out, or start from another model"
        )
    return grown


def extended(source: Source, before: nn.Module, after: nn.Module) -> Source:
    """``source``, of the tensors of ``before``, with the new rows that ``after`` has."""
    wanted = dict(after.named_parameters())
    have = dict(before.named_parameters())
    for name, given in source:
        old, new = have[name].shape, wanted[name].shape
        if old == new:
            yield name, given
        elif isinstance(given, Packed):
            yield name, GrownPacked(given.words, given.scales, tuple(new))
        else:
            yield name, _Grown(given, old)


@dataclass
class _Grown:
    """Rows of a tensor, the mean of all of which stands for every one beyond its last."""

    given: Rows
    shape: torch.Size

    @cached_property
    def mean(self) -> Tensor:
        return mean_row(self.given, self.shape)

    def __call__(self, a: int, b: int) -> Tensor:
        """Rows a … b−1; in fp32 where some of them are new."""
        old = self.shape[0]
        if b <= old:
            return self.given(a, b)
        new = self.mean.expand(b - max(a, old), *self.shape[1:])
        return new if a >= old else torch.cat([self.given(a, old).float(), new])


def mean_row(rows: Callable[[int, int], Tensor], shape: torch.Size) -> Tensor:
    """The mean of all rows of a tensor of ``shape``, in fp32."""
    total = torch.zeros(shape[1:], dtype=torch.float64, device="cpu")
    for a, b in row_tiles(shape):
        total += rows(a, b).double().sum(0)
    return (total / shape[0]).float()


@dataclass(frozen=True)
class GrownPacked(Packed):
    """A packed weight whose ``shape`` has more rows than its files: the mean of those, on the same grid."""

    def codes(self, a: int, b: int) -> tuple[Tensor, Tensor]:
        old = self.words.shape[0]
        parts = [super().codes(a, min(b, old))] if a < old else []
        if b > old:
            codes, scales = self._new
            count = b - max(a, old)
            parts.append((codes.expand(count, -1), scales.expand(count, -1)))
        codes, scales = zip(*parts, strict=True)
        return torch.cat(codes), torch.cat(scales)

    @cached_property
    def _new(self) -> tuple[Tensor, Tensor]:
        shape = torch.Size((self.words.shape[0], self.shape[1]))
        mean = mean_row(Packed(self.words, self.scales, tuple(shape)).rows, shape)
        return quantize(mean[None], self.shape[1] // self.groups)
