"""A run's model split over processes, if ``parallel`` asks for that."""

from collections import Counter
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..config import Config
from ..errors import ConfigError
from ..lowrank.layers.linear import LowRankLinear
from ..lowrank.tensors.splitting import split_outside, split_rows
from ..models.compiling import blocks_of
from ..parallel import Team
from ..parallel.mesh import mesh_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["mesh_for", "split_blocks", "split_outside"]


def mesh_for(config: Config, team: Team, device: torch.device) -> "DeviceMesh | None":
    """The processes of ``team`` in the order in which they hold a split model; None if each holds a whole one."""
    sizes = config.parallel.over(team.size)
    return mesh_of(team, sizes, device.type) if sizes.splits else None


def split_blocks(model: nn.Module, mesh: "DeviceMesh", on_host: bool = False) -> None:
    """Split what the low-rank layers of a model's blocks store, on the meta device, so that no process ever holds it
    all. ``on_host``: the rows are to wait in host memory. Raises :class:`ConfigError` without such blocks, or if they
    have layers in common."""
    blocks = [b for b in blocks_of(model) if any(isinstance(m, LowRankLinear) for m in b.modules())]
    if not blocks:
        raise ConfigError(
            f"parallel: shard gathers weights block by block, and {type(model).__name__} has no blocks that are known; "
            "use parallel: replicate"
        )
    counts = Counter(module for block in blocks for module in block.modules() if isinstance(module, LowRankLinear))
    if counts.most_common(1)[0][1] > 1:
        raise ConfigError(
            f"parallel: shard gathers weights block by block, and blocks of {type(model).__name__} have layers in "
            "common; use parallel: replicate"
        )
    split_rows(blocks, mesh, on_host)
