"""Clipping to a norm of the gradients of all tensors, some of which several processes may share by rows."""

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor

from ..parallel import Team
from .tensor_steps import NORMS, squares
from .tensors.base import TrainedTensor


def clip(parameters: Iterable[Tensor], tensors: Iterable[TrainedTensor], limit: float, team: Team) -> float:
    """Scale the gradients of ``parameters``, and of those ``tensors`` that are shared by rows, so that their norm is at
    most ``limit``; the norm before it, as ``clip_grad_norm_`` gives it."""
    shares = [tensor for tensor in tensors if tensor.shared and tensor.gradient() is not None]
    if not shares:
        return float(torch.nn.utils.clip_grad_norm_(parameters, limit))
    here = [parameter for parameter in parameters if parameter.grad is not None]
    # The norm is that of the whole gradient, of which other processes hold the remaining rows.
    gradients = [parameter.grad for parameter in here if parameter.grad is not None]
    parts = [torch.nn.utils.get_total_norm(gradients).square(), *squares(shares, partial(team.sum_, NORMS))]
    norm = torch.stack([part.to(torch.float32) for part in parts]).sum().sqrt()
    torch.nn.utils.clip_grads_with_norm_(here, limit, norm)
    for tensor in shares:
        gradient = tensor.gradient()
        if gradient is not None:
            gradient.mul_((limit / (norm + 1e-6)).clamp(max=1.0))
    return float(norm)
