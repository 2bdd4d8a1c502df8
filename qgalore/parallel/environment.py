"""What ``torchrun`` says of a job in environment variables, checked before anything waits for other processes."""

import os

from ..errors import ConfigError

LARGEST = 2**16
_REMEDY = "Start several processes with torchrun, or unset WORLD_SIZE to train in one"


def world_size() -> int:
    """The number of processes of the job; 1 without one.

    Raises :class:`ConfigError` for variables that are no numbers, or that contradict each other.
    """
    if "WORLD_SIZE" not in os.environ:
        return 1
    size = _number("WORLD_SIZE", 1, LARGEST)
    if size > 1:
        _number("RANK", 0, size - 1)
    if size > 1 and "LOCAL_RANK" in os.environ:
        _number("LOCAL_RANK", 0, size - 1)
    on_this_machine(size)
    if size > 1:
        _number("MASTER_PORT", 0, LARGEST - 1)
        if not os.environ.get("MASTER_ADDR"):
            raise ConfigError(f"the environment variable MASTER_ADDR is not set; it must name rank 0's host. {_REMEDY}")
    return size


def on_this_machine(size: int) -> int | None:
    """How many of a job's ``size`` processes are on this machine; None if that is not said, or there is one."""
    told = size > 1 and "LOCAL_WORLD_SIZE" in os.environ
    return _number("LOCAL_WORLD_SIZE", 1, size) if told else None


def _number(name: str, low: int, high: int) -> int:
    text = os.environ.get(name)
    value = int(text) if text and text.isascii() and text.isdecimal() and len(text) < 10 else None
    if value is None or not low <= value <= high:
        found = "is not set" if text is None else f"is {text[:40]!r}"
        raise ConfigError(
            f"the environment variable {name} {found}; it must be a whole number from {low} to {high}. {_REMEDY}"
        )
    return value
