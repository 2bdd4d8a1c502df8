"""What memory this machine has, and how a process is held to its share."""

import contextlib
import ctypes
import os
import sys
from pathlib import Path

import torch

LARGE_RUN = 2 << 30
CONTROL_GROUP = Path("/sys/fs/cgroup")  # where Linux shows a container its limits
M_MMAP_THRESHOLD, MAPPED_BYTES = -3, 2 << 20  # glibc's name for: give larger blocks pages of their own


def available(device: torch.device) -> int | None:
    """Bytes that this process may have in all on ``device``, what it holds already included; None if unknown. On a CPU
    the processes of a job share what is free."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024
    except (OSError, StopIteration, ValueError):
        return None
    limit, used = (_number(CONTROL_GROUP / name) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None:
        free = min(free, limit - used + _dropped_at_need())
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) + resident_set()


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _dropped_at_need() -> int:
    """Bytes of files that were read or written, which a control group counts as used and gives back when asked: after
    a checkpoint all of that is left."""
    try:
        lines = (CONTROL_GROUP / "memory.stat").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
    except (OSError, StopIteration, ValueError):
        return 0


def resident_set() -> int:
    """Bytes of physical memory that this process holds now; 0 where that is unknown."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGESIZE")


def hold_back_nothing() -> None:
    """Keep the C allocator of a large run on Linux from holding back what was freed between what was not."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
            ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)
