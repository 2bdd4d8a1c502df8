"""Tensors of which every process of a team holds its own rows: PyTorch's ``DTensor``, as FSDP2 leaves parameters.

FSDP2 gathers a module's parameters before its forward and its backward pass and drops them after. Gradients are not its
business here: what is split is stored, not trained. Rows are dealt as ``torch.chunk`` does it: the last processes may
hold fewer of them, or none.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard(blocks: Iterable[nn.Module], sharded: set[nn.Parameter], mesh: "DeviceMesh", on_host: bool = False) -> None:
    """Leave of the parameters in ``sharded`` (requires_grad False) this process's rows alone, gathered for each of
    ``blocks`` while that runs; all other parameters stay whole, and FSDP2 ignores them. ``mesh``: from ``mesh_of``.
    ``on_host``: the rows are to live in host memory, whose pages FSDP2 locks for a GPU, and are copied to the device
    to be gathered."""
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard  # takes a second to import

    where = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if on_host else OffloadPolicy()
    for block in blocks:
        whole = set(block.parameters()) - sharded
        fully_shard(block, mesh=mesh, reshard_after_forward=True, offload_policy=where, ignored_params=whole)


def is_shared(tensor: Tensor) -> bool:
    """Whether the processes hold rows of ``tensor``."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """The rows here, in the memory in which they are stored; ``tensor`` itself if it is not shared."""
    return tensor.detach().to_local() if is_shared(tensor) else tensor


def like(tensor: Tensor, rows: Tensor) -> Tensor:
    """The tensor of which ``rows`` are the ones here, shared by the processes that share ``tensor``."""
    from torch.distributed.tensor import DTensor

    shape = {"shape": tensor.shape, "stride": tensor.stride()}
    return DTensor.from_local(rows, tensor.device_mesh, tensor.placements, run_check=False, **shape)


def shards_of(tensor: Tensor) -> int:
    """Over how many processes the rows of ``tensor`` are split; 1 if it is not shared."""
    return tensor.device_mesh.shape[-1] if is_shared(tensor) else 1


def holders(tensor: Tensor) -> list[list[int]]:
    """For each share of a shared ``tensor``'s rows, in their order, the processes that hold it: one, or one in each
    replica."""
    mesh = tensor.device_mesh.mesh
    return mesh.reshape(-1, mesh.shape[-1]).T.tolist()


def first_holders(tensor: Tensor) -> tuple[tuple[int, int], ...]:
    """For each share of a shared ``tensor``'s rows, in their order, a process that holds it and its bytes."""
    groups, rows = holders(tensor), torch.arange(tensor.shape[0], device="cpu")
    width = tensor.shape[1:].numel() * tensor.dtype.itemsize
    return tuple((ranks[0], len(share(rows, number, len(groups))) * width) for number, ranks in enumerate(groups))


def rows_of(tensor: Tensor, whole: Tensor) -> Tensor:
    """Of ``whole`` the rows that are here of the shared ``tensor``; all, if it is not shared."""
    if not is_shared(tensor):
        return whole
    return share(whole, tensor.device_mesh.get_local_rank(tensor.device_mesh.ndim - 1), shards_of(tensor))


def overlap(tensor: Tensor, first: int, rows: Tensor) -> tuple[int, Tensor]:
    """Of ``rows``, meant for ``tensor`` from its row ``first`` on: where those that are here go, and they."""
    if not is_shared(tensor):
        return first, rows
    here = rows_of(tensor, torch.arange(tensor.shape[0], device="cpu"))
    start, end = (int(here[0]), int(here[-1]) + 1) if len(here) else (0, 0)
    a, b = max(first, start), min(first + rows.shape[0], end)
    return (a - start, rows[a - first : b - first]) if a < b else (0, rows[:0])


def share(whole: Tensor, number: int, count: int) -> Tensor:
    """The rows of ``whole`` in share ``number`` of ``count``: a view, of no rows if there are too few."""
    rows = -(-whole.shape[0] // count)
    return whole[number * rows : (number + 1) * rows]
