"""How a process finds the others of its job."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

import torch
from torch import distributed as dist
from torch.distributed.rendezvous import rendezvous

from ..errors import QGaloreError
from .environment import world_size
from .roster import fresh_store
from .team import ALONE, PATIENCE, Team
from .telling import is_told


@contextmanager
def job(device: str) -> Iterator[Team]:
    """The job that ``torchrun`` started this process in, over gloo, and NCCL between GPUs unless ``device`` is "cpu";
    :data:`ALONE` without one. Only rank 0 prints: the others' output is dropped, and an error of ours that was told to
    all ends them with its exit code alone.

    Raises :class:`QGaloreError` if the processes do not find each other.
    """
    if world_size() == 1:
        yield ALONE
        return
    team = _join(device != "cpu" and torch.cuda.is_available())
    try:
        if team.leads:
            yield team
        else:
            with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
                yield team
    except QGaloreError as error:
        if team.leads or not is_told(error):
            raise
        raise SystemExit(error.exit_code) from error
    finally:
        dist.destroy_process_group()


def _join(cuda: bool) -> Team:
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
        store = fresh_store(store, rank, size, PATIENCE)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE, store=store, rank=rank, world_size=size)
    except (RuntimeError, ValueError) as error:
        raise QGaloreError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, and the processes of the job do not find each other: {error}. "
            "Start it with torchrun, or without WORLD_SIZE for one process"
        ) from error
    return Team(dist.get_rank(), dist.get_world_size())
