"""Clipping to a norm of the gradients of all tensors, some of which one process has for all."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..parallel import Team
from .tensors.base import TrainedTensor


def clip(parameters: Iterable[Tensor], owned: Sequence[TrainedTensor], limit: float, team: Team) -> float:
    """Scale the gradients of ``parameters`` so that their norm is at most ``limit``; the norm before it, as
    ``clip_grad_norm_`` gives it. Those of ``owned`` tensors are with one process of ``team`` each."""
    parameters = list(parameters)
    if not owned:
        here = [parameter for parameter in parameters if parameter.grad is not None]
        return _scale(here, limit, torch.nn.utils.get_total_norm([p.grad for p in here if p.grad is not None]))
    elsewhere = {id(tensor.leaves()[0]) for tensor in owned if tensor.elsewhere}
    mine = {id(leaf) for tensor in owned if not tensor.elsewhere for leaf in tensor.leaves()}
    here, norms = [], []
    # The norm of norms depends on their order. So each process has a place for all of them, in that of one process, and
    # those that are the same everywhere are added once.
    for parameter in parameters:
        if parameter.grad is not None:
            here.append(parameter)
            counts = team.leads or id(parameter) in mine
            norm = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
            norms.append(norm if counts else torch.zeros_like(norm))
        elif id(parameter) in elsewhere:
            norms.append(torch.zeros((), device=parameter.device))
    found = torch.stack(norms)
    team.sum_("the norms of the gradients", [found])
    return _scale(here, limit, torch.linalg.vector_norm(found))


def _scale(parameters: list[Tensor], limit: float, norm: Tensor) -> float:
    """Clip as ``clip_grad_norm_`` does. A ``norm`` that is not finite would spoil every gradient, and whoever looks for
    the one that is to blame would find the first."""
    found = float(norm)
    if math.isfinite(found):
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return found
