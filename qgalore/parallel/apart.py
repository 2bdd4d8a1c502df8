"""Parameters outside of a model's blocks, of which each process of a team keeps rows alone: embeddings and head.

They train, so FSDP2, which would reduce their gradients its own way, has no hand in them. Such a parameter stays the
object that everyone knows. Between its uses it has its shape but no memory, and its rows are kept beside it.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import shards
from .telling import reaching

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

KEPT = "kept_by_rows"  # an attribute of such a parameter


class Apart:
    """Lets go of ``parameter``'s memory but for this process's rows in ``mesh``. ``rows``: the shared tensor."""

    def __init__(self, parameter: nn.Parameter, mesh: "DeviceMesh") -> None:
        from torch.distributed.tensor import DTensor, Replicate, Shard

        self.parameter = parameter
        whole = parameter.detach()
        number = mesh.get_local_rank(mesh.ndim - 1)
        rows = shards.share(whole, number, mesh.shape[-1]).clone()
        placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
        shape = {"shape": whole.shape, "stride": whole.stride()}
        self.rows = DTensor.from_local(rows, mesh, placements, run_check=False, **shape)
        setattr(parameter, KEPT, self)
        self.drop()

    def gather(self) -> None:
        """Make the parameter whole, if it is not: in every process of the team."""
        if not self.whole:
            with reaching(), torch.no_grad():
                self.parameter.data = self.rows.full_tensor()
            self.whole = True

    def drop(self) -> None:
        """Keep the rows alone."""
        self.parameter.data = self.rows.to_local().new_zeros(()).expand(self.rows.shape)
        self.whole = False


def kept(tensor: Tensor) -> Tensor:
    """What is kept of ``tensor`` between its uses: a shared tensor of its rows, or itself."""
    found: Apart | None = getattr(tensor, KEPT, None)
    return tensor if found is None else found.rows


def kept_in(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of ``model``, with what is kept of each tensor."""
    return {name: kept(value).detach() for name, value in model.state_dict(keep_vars=True).items()}


def in_model(model: nn.Module) -> list[Apart]:
    """All of a model's parameters that are apart, each once."""
    return [getattr(parameter, KEPT) for parameter in model.parameters() if hasattr(parameter, KEPT)]


def set_apart(model: nn.Module, parameters: Iterable[nn.Parameter], mesh: "DeviceMesh") -> None:
    """Set ``parameters`` of ``model`` apart. Calling a module that has one of them makes it whole again, and so does
    :func:`gather_of`; whoever takes a step says when it is dropped."""
    chosen = {id(Apart(parameter, mesh).parameter) for parameter in parameters}
    for module in model.modules():
        if any(id(parameter) in chosen for parameter in module.parameters(recurse=False)):
            module.register_forward_pre_hook(lambda module, _: gather_of(module))


def gather_of(module: nn.Module) -> None:
    """Make a module's own parameters whole, for whoever uses them without calling it."""
    for parameter in module.parameters(recurse=False):
        if hasattr(parameter, KEPT):
            getattr(parameter, KEPT).gather()


def drop_all(model: nn.Module) -> None:
    """Keep the rows of all parameters of ``model`` alone, because these have changed."""
    for one in in_model(model):
        one.drop()
