"""Page-locking of ordinary memory, which a GPU then reads and writes at the full speed of its link.

PyTorch's own allocator of page-locked memory rounds every size up to a power of two. Here the memory is there already,
in pages of its own, and is registered with the driver a part at a time.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

PART = 256 << 20  # bytes: small enough for a progress bar to move and for a refusal to cost little
Register = Callable[[int, int], int]  # (address, bytes) → an error code of CUDA, 0 if all is well
Release = Callable[[int], int]  # address → the same


class Locked:
    """The parts of ``memories`` (page-aligned buffers of bytes) that are registered, until :meth:`release` or the end
    of this object. Locking stops at the first part that the driver refuses; ``refused`` is then its error code."""

    def __init__(self, memories: Sequence[Tensor], register: Register, release: Release) -> None:
        self.nbytes, self.total = 0, sum(memory.nbytes for memory in memories)
        self.refused: int | None = None
        parts = [(memory.data_ptr() + a, min(PART, memory.nbytes - a)) for memory in memories for a in _starts(memory)]
        done: list[int] = []
        self._ending = weakref.finalize(self, _release_all, done, release, list(memories))
        with tqdm(total=self.total, desc="locking", unit="B", unit_scale=True, disable=self.total < 4 * PART) as bar:
            for address, size in parts:
                code = register(address, size)
                if code:
                    self.refused = code
                    return
                done.append(address)
                self.nbytes += size
                bar.update(size)

    def release(self) -> None:
        """Give all parts back to the system."""
        self._ending()

    def __str__(self) -> str:
        locked = f"{self.nbytes / 2**30:.2f} GiB of host memory are page-locked"
        if self.refused is None:
            return locked
        return (
            f"{locked}, {(self.total - self.nbytes) / 2**30:.2f} GiB are not: the driver refused them (CUDA error "
            f"{self.refused}). Their copies are slower and hide behind less of the arithmetic; raise the limit of "
            "locked memory (ulimit -l) to lock them too"
        )


def lock(memories: Sequence[Tensor]) -> Locked:
    """Register ``memories`` with the driver of CUDA."""
    runtime: Any = torch.cuda.cudart()
    return Locked(
        memories,
        lambda address, size: int(runtime.cudaHostRegister(address, size, 0)),
        lambda address: int(runtime.cudaHostUnregister(address)),
    )


def _starts(memory: Tensor) -> range:
    return range(0, memory.nbytes, PART)


def _release_all(addresses: list[int], release: Release, memories: list[Tensor]) -> None:
    """``memories`` are held until now, so that no registered page is unmapped."""
    while addresses:
        release(addresses.pop())
    memories.clear()
