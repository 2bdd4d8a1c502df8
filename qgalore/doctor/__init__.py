"""What a machine can do for this project: its software, its kernels, its speed, and what would fit on it."""

from .report import examine

__all__ = ["examine"]
