"""Tensors that one process steps for all: the state that it keeps, and the rank that it finds."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...parallel import Team
from ...parallel.kept import Kept
from .base import TrainedTensor


def states(tensors: Sequence[TrainedTensor], team: Team) -> dict[str, dict[str, Any]]:
    """What each of ``tensors`` keeps, by name. Of those that one process steps for all, every process gets the numbers
    and, as :class:`Kept`, what kinds of tensors there are."""
    found = {tensor.name: tensor.state() for tensor in tensors if not tensor.elsewhere}
    owned = {tensor.name: tensor.owner for tensor in tensors if tensor.owner is not None}
    if not owned:
        return found
    mine = {name: _kept(found[name], owner) for name, owner in owned.items() if name in found}
    told = team.gather("what each process keeps", {name: _described(state) for name, state in mine.items()})
    all_owned = {name: state for part in told for name, state in part.items()} | mine
    return {tensor.name: all_owned.get(tensor.name) or found[tensor.name] for tensor in tensors}


def find_rank(tensor: Any, team: Team, refresh: Callable[[], None]) -> None:
    """Let the owner of an adaptive ``tensor`` ``refresh`` it, and all wait for the rank that it finds. All ranks share
    a budget, so that what the next refresh may take hangs on this one, whoever its owner is."""
    with team.together(f"the rank of {tensor.name}") as said:
        if not tensor.elsewhere:
            refresh()
            said.note = tensor.rank
    if tensor.elsewhere and said.note:  # on paper there is no owner elsewhere who says one
        tensor.take_rank(said.note)


def _kept(state: dict[str, Any], owner: int) -> dict[str, Any]:
    """A tensor's state, with what this process keeps of it marked as its own."""

    def marked(value: Any) -> Any:
        return Kept(owner, value.dtype, tuple(value.shape), value) if torch.is_tensor(value) else value

    return _changed(state, marked)


def _described(state: dict[str, Any]) -> dict[str, Any]:
    """The same without the values of tensors."""
    return _changed(state, lambda value: value.elsewhere() if isinstance(value, Kept) else value)


def _changed(state: dict[str, Any], change: Any) -> dict[str, Any]:
    tensors = {kind: {name: change(value) for name, value in state[kind].items()} for kind in ("inner", "extra")}
    return {**state, **tensors}
