"""The processes of a job as a grid: rows of processes that split a model between them, and columns of its copies."""

from datetime import timedelta
from typing import TYPE_CHECKING, Protocol

import torch
from torch import distributed as dist

from .team import Team

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

PATIENCE = timedelta(minutes=5)  # for what travels along it, which nobody should be late for


class Layout(Protocol):
    """How many copies of a model there are, and over how many neighbouring processes each is split."""

    @property
    def replicas(self) -> int: ...

    @property
    def shards(self) -> int: ...


def mesh_of(team: Team, layout: Layout, device_type: str) -> "DeviceMesh":
    """The processes of ``team`` as PyTorch's ``fully_shard`` takes them, on devices of ``device_type``.

    With one copy it has the dimension ``shard`` alone, else ``replicate`` and ``shard``. Its groups are new, and give
    up after :data:`PATIENCE`. All processes of the job call it, once. The sizes must multiply to their number.
    """
    from torch.distributed.device_mesh import DeviceMesh  # takes a while to import

    assert layout.replicas * layout.shards == team.size, "a configuration's mesh is one of all processes"
    if layout.replicas == 1:
        return DeviceMesh.from_group(dist.new_group(timeout=PATIENCE), device_type, mesh_dim_names=("shard",))
    ranks = torch.arange(team.size, dtype=torch.int, device="cpu").view(layout.replicas, layout.shards)
    # init_device_mesh would make the same groups with the patience of the whole job.
    groups = [dist.new_subgroups_by_enumeration(lines.tolist(), timeout=PATIENCE)[0] for lines in (ranks.T, ranks)]
    return DeviceMesh.from_group(groups, device_type, mesh=ranks, mesh_dim_names=("replicate", "shard"))
