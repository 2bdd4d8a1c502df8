"""Counter-based random bits: a function of (seed, step, tensor index, element), with no generator state.

A resumed run therefore rounds exactly like an uninterrupted one, fused and deferred stepping round alike, and a shard
of a tensor can draw the bits of its own elements. The mixing function is a two-round 32-bit integer hash (the
xor-shift-multiply "lowbias32" finaliser), keyed by 64 bits of BLAKE2b; it needs only 32-bit integer arithmetic.
"""

import hashlib
import struct
from functools import partial

import torch
from torch import Tensor

MAX_ELEMENTS = 1 << 32
# Numbers as tensors of the right type: Python's would be converted in every call.
_as_number = partial(torch.tensor, dtype=torch.int32, device="cpu")  # whatever a program's default device is
_MULTIPLIERS = [_as_number(value) for value in (0x7FEB352D, 0x846CA68B - (1 << 32))]
_SHIFTS = [(_as_number(by), _as_number((1 << 32 - by) - 1)) for by in (16, 15)]
_NINE, _MANTISSA, _ONE = (_as_number(value) for value in (9, 0x7FFFFF, 0x3F800000))


def derive_key(*parts: int) -> tuple[int, int]:
    """Two signed 32-bit integers that name a random stream, for example ``derive_key(seed, step, tensor_index)``."""
    words = struct.pack(f"<{len(parts)}q", *parts)
    return struct.unpack("<2i", hashlib.blake2b(words, digest_size=8).digest())


def _mix_(x: Tensor, scratch: Tensor) -> Tensor:
    """Scramble int32 values in place. The shift is arithmetic on int32, so each is masked to a logical one."""
    for (by, mask), multiplier in zip((*_SHIFTS, _SHIFTS[0]), (*_MULTIPLIERS, None), strict=True):
        x.bitwise_xor_(torch.bitwise_right_shift(x, by, out=scratch).bitwise_and_(mask))
        if multiplier is not None:
            x.mul_(multiplier)
    return x


def ramp(count: int, device: torch.device | str = "cpu") -> Tensor:
    """0, 1, … count − 1 as int32, which :func:`fill_random_bits` starts from."""
    return torch.arange(count, dtype=torch.int32, device=device)


def fill_random_bits(key: tuple[int, int], start: int, first: Tensor, out: Tensor, scratch: Tensor) -> Tensor:
    """``out`` ← random int32 values for the elements ``start …`` of the stream ``key``; returns it.

    ``first`` is a :func:`ramp`; it, ``out`` and ``scratch`` are int32 of one shape. Raises ``ValueError`` past the
    stream's end.
    """
    if start + out.numel() > MAX_ELEMENTS:
        raise ValueError(
            f"element {start + out.numel()} of a stream was asked for; a stream has {MAX_ELEMENTS} elements"
        )
    signed = start if start < 1 << 31 else start - (1 << 32)
    # The sum wraps around, as the lower 32 bits of the element number do.
    torch.add(first, signed, out=out)
    _mix_(out.bitwise_xor_(key[0]), scratch)
    return _mix_(out.add_(key[1]), scratch)


def random_bits(key: tuple[int, int], start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Random int32 values (count,) for the elements ``start … start + count − 1`` of the stream ``key``."""
    first = ramp(min(count, MAX_ELEMENTS - 1), device)
    return fill_random_bits(key, start, first, torch.empty_like(first), torch.empty_like(first))


def uniform(bits: Tensor) -> Tensor:
    """Map int32 bits to fp32 in (0, 1): the midpoints of 2²³ equal cells, all exact, so that comparing with a
    probability is right to 2⁻²⁴, and a probability of exactly 0 or 1 never or always wins."""
    return uniform_(bits.clone())


def uniform_(bits: Tensor) -> Tensor:
    """:func:`uniform` in the memory of ``bits``: the upper 23 bits k as the mantissa of 1 + k · 2⁻²³, less 1 − 2⁻²⁴."""
    mantissa = bits.bitwise_right_shift_(_NINE).bitwise_and_(_MANTISSA).bitwise_or_(_ONE)
    return mantissa.view(torch.float32).sub_(1.0 - 2.0**-24)
