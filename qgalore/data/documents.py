"""Which tokens of packed rows belong together, as a model's attention needs to know it."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch.nn.attention.flex_attention import BlockMask


class Documents(BlockMask):
    """The lengths of the documents in each row of a micro-batch, which stands in the place of an attention mask.

    It holds numbers and no tensor, so that reading it never waits for a device. To transformers a block mask of four
    dimensions is a mask that is ready: it asks nothing of it and hands it to the layers as it is.
    """

    def __init__(self, lengths: Iterable[Sequence[int]]) -> None:
        """``lengths``: for each row those of its documents, in order. All rows are equally long."""
        # Not BlockMask's own initialisation, which is about tensors.
        self.lengths = tuple(tuple(map(int, row)) for row in lengths)
        assert len({sum(row) for row in self.lengths}) <= 1, "rows of one micro-batch are equally long"

    @classmethod
    def of(cls, positions: np.ndarray) -> "Documents":
        """Those of ``positions`` (rows, tokens), which are 0 where a document starts."""
        rows, length = positions.shape
        starts = [np.flatnonzero(row == 0) for row in positions]
        return cls([np.diff([*(row if row.size else [0]), length]) for row in starts] if length else [()] * rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, 1, tokens, tokens), as of a mask."""
        length = sum(self.lengths[0]) if self.lengths else 0
        return len(self.lengths), 1, length, length

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def whole(self) -> bool:
        return all(len(row) <= 1 for row in self.lengths)

    def to(self, *_: Any, **__: Any) -> "Documents":
        """Itself: it is on no device."""
        return self

    def __repr__(self) -> str:
        return f"Documents({self.lengths})"

    __str__ = __repr__
