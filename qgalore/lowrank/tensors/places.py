"""Where what a step changes is stored: whole in every process, or by rows with FSDP2 between two turns of its block."""

from dataclasses import dataclass

from torch import Tensor, nn

from ...parallel import shards
from ...parallel.handing import Handed


@dataclass(frozen=True)
class Place:
    """The tensor ``key`` of ``module``. ``rows``: the shared tensor that keeps it between two turns of its block; None
    if it is whole in every process."""

    module: nn.Module
    key: str
    rows: Tensor | None

    @property
    def tensor(self) -> Tensor:
        """It, as it is now."""
        return getattr(self.module, self.key).detach()

    @property
    def nbytes(self) -> int:
        """Of the whole tensor."""
        return self.tensor.nbytes

    def share(self, count: int) -> Tensor:
        """Of a whole tensor the first of ``count`` shares of its rows, which is as large as any."""
        return shards.share(self.tensor, 0, count)

    def handed(self, owner: int) -> Handed:
        """It, changed by process ``owner``. If it is split, its block must be gathered."""
        return Handed(self.tensor, self.rows, owner)


def places(module: nn.Module, *keys: str) -> list[Place]:
    """The places of the tensors ``keys`` as they are now, between two turns, but for those that ``module`` has not."""
    found = ((key, getattr(module, key)) for key in keys)
    return [Place(module, key, t if shards.is_shared(t) else None) for key, t in found if t is not None]
