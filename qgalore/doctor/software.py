"""The versions that matter, and what is wrong with their combination."""

import ctypes.util
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = ("torch", "transformers", "triton", "triton-windows", "bitsandbytes", "safetensors", "liger-kernel")


def version(package: str) -> str | None:
    """The version that is installed; None if none is."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def driver() -> str | None:
    """What the NVIDIA driver here says of itself and its first card, whatever PyTorch can see; None without one."""
    program = shutil.which("nvidia-smi")
    if program is not None:
        query = [program, "--query-gpu=driver_version,name", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.splitlines()[0].strip()
    if Path("/proc/driver/nvidia/version").exists():
        return Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace").splitlines()[0]
    if sys.platform == "win32" and ctypes.util.find_library("nvcuda"):
        return "a driver is installed"
    return None


def lines() -> list[str]:
    """Name and version of everything, one a line."""
    found = [f"{'system':<16}{platform.platform()}, Python {platform.python_version()}"]
    found.append(f"{'NVIDIA driver':<16}{driver() or 'none'}")
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for the CPU alone"
    for package in PACKAGES:
        told = version(package)
        if told is not None or package in ("triton", "bitsandbytes"):
            found.append(f"{package:<16}{told or 'not installed'}{f', {built}' if package == 'torch' else ''}")
    return found


def remarks() -> list[str]:
    """What keeps a card from being used, or makes it slower than it need be; each with its remedy."""
    found = []
    windows = sys.platform == "win32"
    if driver() is not None and not torch.cuda.is_available():
        if torch.version.cuda is None:
            found.append(
                "this machine has an NVIDIA card, but the PyTorch that is installed was built for the CPU alone. "
                "Install it again from https://pytorch.org/get-started/locally, with CUDA chosen there"
            )
        else:
            found.append(
                "this machine has an NVIDIA card that PyTorch cannot use. Bring the driver up to date: PyTorch was "
                f"built for CUDA {torch.version.cuda}"
            )
    if not torch.cuda.is_available():
        return found
    if version("triton") is None and version("triton-windows") is None:
        package = "triton-windows" if windows else "triton"
        found.append(f"without Triton every write-back is dozens of launches; pip install {package}")
    if torch.cuda.get_device_capability() < (8, 0):
        found.append(
            "this card is older than Ampere and computes no bf16. PyTorch would emulate it slowly: set "
            "model.dtype=float32. fp16 is not offered. The merge then multiplies in fp32, without tensor cores"
        )
    return found
