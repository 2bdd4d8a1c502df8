"""``run.deterministic``: the same bits from the same run, or a refusal."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import ConfigError
from ..replacing import replaced

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_SETTINGS = (":4096:8", ":16:8")  # with which cuBLAS promises the same bits every time


@contextmanager
def deterministic(asked: bool) -> Iterator[None]:
    """Inside, if ``asked``, PyTorch takes only operations that give the same bits every time. Enter it before anything
    runs on a GPU: cuBLAS reads its setting at its first product. Raises :class:`ConfigError` where it cannot be so."""
    if not asked:
        yield
        return
    stated = os.environ.setdefault(_WORKSPACE, _SETTINGS[0])
    if stated not in _SETTINGS:
        raise ConfigError(
            f"run.deterministic is true, and the environment says {_WORKSPACE}={stated}. It must be "
            f"{' or '.join(_SETTINGS)} for products that give the same bits every time; unset it, or set "
            "run.deterministic=false"
        )
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn, memory = torch.backends.cudnn, torch.utils.deterministic
    # New memory stays as it is: filling it would take time, and nothing reads it before it is written.
    changes = [
        (cudnn, "deterministic", True),
        (cudnn, "benchmark", False),
        (memory, "fill_uninitialized_memory", False),
    ]
    try:
        with replaced(changes):
            torch.use_deterministic_algorithms(True)
            yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise ConfigError(
            f"run.deterministic is true, and an operation of this run has no kernel that gives the same bits every "
            f"time: {str(error).strip().splitlines()[0]} Set run.deterministic=false"
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
