"""Counter-based random bits: a function of (seed, step, tensor index, element), with no generator state.

A resumed run therefore rounds exactly like an uninterrupted one, fused and deferred stepping round alike, and a shard
of a tensor can draw the bits of its own elements. The mixing function is a two-round 32-bit integer hash (the
xor-shift-multiply "lowbias32" finaliser), keyed by 64 bits of BLAKE2b; it needs only 32-bit integer arithmetic.
"""

import hashlib

import torch
from torch import Tensor

_MULTIPLIERS = (0x7FEB352D, 0x846CA68B - (1 << 32))  # as signed 32-bit
MAX_ELEMENTS = 1 << 32


def derive_key(*parts: int) -> tuple[int, int]:
    """Two signed 32-bit integers that name a random stream, for example ``derive_key(seed, step, tensor_index)``."""
    digest = hashlib.blake2b(b"".join(part.to_bytes(8, "little", signed=True) for part in parts), digest_size=8)
    raw = digest.digest()
    return int.from_bytes(raw[:4], "little", signed=True), int.from_bytes(raw[4:], "little", signed=True)


def _mix_(x: Tensor) -> Tensor:
    """Scramble int32 values in place. ``>>`` is arithmetic on int32, so each shift is masked to a logical one."""
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(_MULTIPLIERS[0])
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(_MULTIPLIERS[1])
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def random_bits(key: tuple[int, int], start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Random int32 values (count,) for the elements ``start … start + count − 1`` of the stream ``key``."""
    if start + count > MAX_ELEMENTS:
        raise ValueError(f"element {start + count} of a stream was asked for; a stream has {MAX_ELEMENTS} elements")
    x = torch.arange(start, start + count, dtype=torch.int64, device=device).to(torch.int32)
    _mix_(x.bitwise_xor_(key[0]))
    return _mix_(x.add_(key[1]))


def uniform(bits: Tensor) -> Tensor:
    """Map int32 bits to fp32 in (0, 1): the midpoints of 2²³ equal cells, all exact, so that comparing with a
    probability is right to 2⁻²⁴, and a probability of exactly 0 or 1 never or always wins."""
    return (bits >> 9).bitwise_and_(0x7FFFFF).to(torch.float32).add_(0.5).mul_(2.0**-23)
