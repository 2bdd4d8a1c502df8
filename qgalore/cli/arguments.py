"""Kinds of arguments that several programs take, each checked before anything slow begins."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from ..errors import ConfigError

CHECKPOINTS = "checkpoints"  # of a run's folder
STATE = "state.json"  # of a checkpoint


def parser(program: str, description: str, examples: str) -> argparse.ArgumentParser:
    """A parser for ``program``, whose help ends with ``examples``, a line each; ``%(prog)s`` stands for the program."""
    return argparse.ArgumentParser(
        prog=program,
        description=description,
        epilog=f"examples:\n{examples.strip(chr(10))}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def whole(low: int, high: int = 2**31) -> Callable[[str], int]:
    """A kind for argparse: whole numbers from ``low`` to ``high``."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text[:60]!r} is not a whole number from {low} to {high}")
        return value

    return read


def real(low: float, high: float) -> Callable[[str], float]:
    """A kind for argparse: numbers from ``low`` to ``high``."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text[:60]!r} is not a number from {low:g} to {high:g}")
        return value

    return read


def saved_folder(source: Path) -> Path:
    """What ``source`` stands for: the newest checkpoint of a run, or itself.

    Raises :class:`ConfigError` if it is not there, is a file, or is a run without a checkpoint.
    """
    if not source.exists():
        raise ConfigError(f"{source} does not exist. Name a run, RUN/checkpoints/step-… or an hf folder.")
    if not source.is_dir():
        raise ConfigError(f"{source} is a file. Name a folder: a run, RUN/checkpoints/step-… or an hf folder.")
    if source.name == CHECKPOINTS and not (source / STATE).exists():
        source = source.parent
    if not (source / CHECKPOINTS).is_dir() or (source / STATE).exists():
        return source
    from ..files.checkpoint import newest_in

    return newest_in(source)


def fresh_folder(out: Path, option: str) -> Path:
    """``out``, if a program may write there. Raises :class:`ConfigError` if it holds something, or is a file."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{option} {out} exists and is not an empty folder; choose another")
    return out


def check_device(name: str) -> None:
    """Raise :class:`ConfigError` for a ``--device`` that is not there."""
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device {name}: there is no such device; give cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name}: only cpu and cuda are known here")
    there = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= there:
        raise ConfigError(f"--device {name}: PyTorch sees {there} CUDA devices here; leave the option out for the CPU")
