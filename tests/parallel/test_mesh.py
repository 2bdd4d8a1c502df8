"""The processes of a job as a grid, over which FSDP2 splits what it is given."""

import torch
from processes import run_in
from torch import nn

from qgalore import config
from qgalore.parallel import job
from qgalore.parallel.mesh import PATIENCE, mesh_of

WHOLE = torch.arange(40, dtype=torch.int8).view(5, 8)


def split(mesh):
    """Where this process is in ``mesh``, how long its groups wait, the rows it holds of 5, and those gathered."""
    from torch.distributed.fsdp import fully_shard

    block = nn.Module()
    block.weight = nn.Parameter(WHOLE.clone(), requires_grad=False)
    fully_shard(block, mesh=mesh)
    held = block.weight.to_local().tolist()
    block.unshard()
    groups = [mesh.get_group(name) for name in mesh.mesh_dim_names]
    waits = {group._get_backend(torch.device("cpu")).options._timeout for group in groups}
    return {name: mesh.get_local_rank(name) for name in mesh.mesh_dim_names}, waits, held, block.weight.tolist()


def split_over_each():
    with job("cpu") as team:
        return [split(mesh_of(team, config.Mesh(*sizes), "cpu")) for sizes in ((2, 2), (1, 4))]


def test_neighbours_split_a_copy_and_each_copy_is_whole():
    for rank, (grid, line) in enumerate(run_in(4, split_over_each)):
        assert grid[0] == {"replicate": rank // 2, "shard": rank % 2}
        assert line[0] == {"shard": rank}
        for (_, waits, held, gathered), shards in ((grid, 2), (line, 4)):
            assert waits == {PATIENCE}
            assert gathered == WHOLE.tolist()
            parts = [part.tolist() for part in WHOLE.chunk(shards)]  # rows that do not divide: the last may hold none
            assert held == dict(enumerate(parts)).get(rank % shards, [])
