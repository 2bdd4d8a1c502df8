"""What an inner optimizer's moments become when a layer's subspace changes: ``keep``, ``rotate`` or ``reset``.

``rotate`` expresses the moments in the new coordinates: with C = P_newᵀ P_old, m ← m Cᵀ and v ← v (C∘C)ᵀ on a right
basis (C m and (C∘C) v on a left one). The second moment stays non-negative, and for P_new = P_old both are unchanged.
"""

import torch
from torch import Tensor
from torch.optim import Optimizer

from ...errors import ConfigError
from ...quant import fourbit
from ...quant.blockwise import BLOCK, dequantize, quantize

POLICIES = ("keep", "rotate", "reset")
# (first moment, second moment) names in the state of an optimizer for one parameter.
FIRST_MOMENTS = ("exp_avg", "momentum_buffer", "state1", "packed1")
SECOND_MOMENTS = ("exp_avg_sq", "state2", "packed2")


def change_of_basis(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    """C = P_newᵀ P_old (r, r), or None where the side is the identity."""
    return None if old is None or new is None else new.T @ old


def _turn(moment: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    moment = moment if left is None else left @ moment
    return moment if right is None else moment @ right.T


def _squared(change: Tensor | None) -> Tensor | None:
    return None if change is None else change.square()


def read(state: dict, name: str) -> Tensor:
    """The moment ``name`` of an optimizer's ``state`` in fp32, a fresh tensor (4-bit ones: of a matrix); 8-bit ones by
    their device's code."""
    stored, number = state[name], name[-1]
    # 4-bit moments are packed two to a byte, and first and second ones have formats of their own.
    if name == "packed1":
        return fourbit.decode_first(stored, state["absmax1"], (state["rows2"].numel(), state["columns2"].numel()))
    if name == "packed2":
        return fourbit.decode_second(stored, state["rows2"], state["columns2"])
    if stored.dtype != torch.uint8:
        return stored.float().clone()
    code, absmax = state[f"qmap{number}"], state[f"absmax{number}"]
    if stored.device.type == "cpu":
        return dequantize(stored, absmax, code)
    import bitsandbytes.functional as bnb

    flat = bnb.dequantize_blockwise(stored.view(-1), absmax=absmax, code=code, blocksize=BLOCK)
    return flat.view(stored.shape).float()


def write(state: dict, name: str, moment: Tensor) -> None:
    """Inverse of :func:`read`, in place: the fp32 ``moment`` in the format of what is stored."""
    stored, number = state[name], name[-1]
    if name == "packed1":
        for kept, value in zip((stored, state["absmax1"]), fourbit.encode_first(moment), strict=True):
            kept.copy_(value)
        return
    if name == "packed2":
        # Rows and columns have other maxima after a turn, and the codes are relative to them.
        rows, columns = moment.amax(dim=1), moment.amax(dim=0)
        stored.copy_(fourbit.encode_second(moment, rows, columns))
        state["rows2"].copy_(rows)
        state["columns2"].copy_(columns)
        return
    if stored.dtype != torch.uint8:
        stored.copy_(moment)
        return
    code, absmax = state[f"qmap{number}"], state[f"absmax{number}"]
    if stored.device.type == "cpu":
        codes, peaks = quantize(moment, code)
    else:
        import bitsandbytes.functional as bnb

        codes, fresh = bnb.quantize_blockwise(moment.contiguous().view(-1), code=code, blocksize=BLOCK)
        peaks = fresh.absmax
    stored.copy_(codes.view(stored.shape))
    absmax.copy_(peaks)


def rotate(inner: Optimizer, leaf: Tensor, left: Tensor | None, right: Tensor | None) -> None:
    """Rotate ``leaf``'s moments by the changes of basis ``left`` and ``right`` (each (r, r) or None).

    Raises :class:`ConfigError` if the optimizer keeps a tensor of the leaf's shape that is not a known moment.
    """
    state = inner.state.get(leaf, {})
    known = FIRST_MOMENTS + SECOND_MOMENTS
    for name, value in state.items():
        if torch.is_tensor(value) and value.shape == leaf.shape and name not in known:
            raise ConfigError(
                f"{type(inner).__name__} keeps {name!r}, not a moment that 'rotate' knows ({', '.join(known)}); "
                "set lowrank.moments=keep or lowrank.moments=reset"
            )
    # A first moment turns with the basis. A second moment is a mean of squares, and turns with the squared entries.
    for names, sides in ((FIRST_MOMENTS, (left, right)), (SECOND_MOMENTS, (_squared(left), _squared(right)))):
        for name in names:
            if torch.is_tensor(state.get(name)):
                write(state, name, _turn(read(state, name), *sides))


def carry(old: dict, new: dict, left: Tensor | None, right: Tensor | None) -> None:
    """Fill ``new``, the fresh state of a leaf of another rank, with the moments and counts of ``old``, turned by the
    rectangular changes of basis ``left`` and ``right`` (each (r_new, r_old) or None).

    With orthonormal bases m P_oldᵀ becomes its projection onto the new subspace, as ``rotate`` has it.
    """
    for names, sides in ((FIRST_MOMENTS, (left, right)), (SECOND_MOMENTS, (_squared(left), _squared(right)))):
        for name in (name for name in names if torch.is_tensor(old.get(name))):
            write(new, name, _turn(read(old, name), *sides))
    # Step counts are the same at any rank.
    new |= {name: value for name, value in old.items() if not torch.is_tensor(value) or value.ndim == 0}


def reset(inner: Optimizer, leaf: Tensor) -> None:
    """Forget the leaf's state, its step count included, so that bias correction starts again."""
    inner.state.pop(leaf, None)
