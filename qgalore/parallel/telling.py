"""Errors that concern all processes of a job, and whether all know of one already."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .. import errors
from ..errors import RankError


@contextmanager
def reaching() -> Iterator[None]:
    """A collective. One that fails has lost a process, which nobody need be told of; or it finds no memory here, and
    the others find this process's connections closed as soon as it has ended."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        told(error)
        raise
    except RuntimeError as error:  # gloo's and NCCL's errors are of this class
        raise told(
            RankError(
                f"another process of the job has ended or does not answer ({str(error).splitlines()[0]}). What it said "
                "is above, if it could; go on with --resume auto, which torchrun --max-restarts does by itself"
            )
        ) from error


def kind_of(error: Exception) -> str:
    """The class of ours that tells other processes what to do about ``error``."""
    ours = (errors.ConfigError, errors.DoesNotFitError, errors.NumericalError)
    return next((kind.__name__ for kind in ours if isinstance(error, kind)), RankError.__name__)


def told(error: Exception) -> Exception:
    """Mark an error that every process has."""
    error.told_to_all = True
    return error


def is_told(error: BaseException | None) -> bool:
    return error is not None and (hasattr(error, "told_to_all") or is_told(error.__cause__))
