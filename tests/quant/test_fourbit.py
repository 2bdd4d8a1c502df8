import bitsandbytes as bnb
import pytest
import torch

from qgalore.quant import fourbit


def matrix(*shape, seed=0):
    """Values whose size varies over rows and columns, as moments do."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [torch.randn(n, generator=generator).mul(2).exp() for n in shape]
    return torch.randn(shape, generator=generator) * sizes[0].unsqueeze(1) * sizes[1]


def test_the_map_is_bitsandbytes():
    """Which it fills up to 256 entries with zeros."""
    theirs = bnb.functional.create_dynamic_map(signed=True, max_exponent_bits=3, total_bits=4)
    assert torch.equal(fourbit.signed_map(torch.device("cpu")), theirs.unique())


@pytest.mark.parametrize("shape", [(1, 1), (3, 43), (64, 64), (129, 257)])
def test_first_moments_take_the_nearest_code(shape, device):
    x = matrix(*shape).to(device)
    packed, absmax = fourbit.encode_first(x)
    blocks = -(-x.numel() // 128)
    assert packed.shape == (blocks, 64)
    assert packed.dtype == torch.uint8
    peak = absmax.repeat_interleave(128)[: x.numel()].view(shape)
    code = fourbit.signed_map(x.device)
    best = ((x / peak).unsqueeze(-1) - code).abs().amin(dim=-1)
    error = (fourbit.decode_first(packed, absmax, shape) - x).abs()
    assert bool((error <= best * peak + 1e-6 * peak).all())  # fp32's error of both sides


@pytest.mark.parametrize("shape", [(1, 1), (3, 43), (64, 64), (129, 257)])
def test_second_moments_take_the_nearest_level_and_never_zero(shape, device):
    v = matrix(*shape, seed=1).square().to(device)
    v[0, -1] = 0.0
    rows, columns = v.amax(dim=1), v.amax(dim=0)
    packed = fourbit.encode_second(v, rows, columns)
    assert packed.shape == (shape[0], (shape[1] + 1) // 2)
    got = fourbit.decode_second(packed, rows, columns)
    unit = torch.minimum(rows.unsqueeze(1), columns.unsqueeze(0))
    wanted = v.clamp(min=unit / 16)  # what is less is rounded up
    assert bool(((got - wanted).abs() <= unit * (1 / 32 + 1e-6)).all())
    assert bool((got > 0)[unit > 0].all())
    assert torch.equal(fourbit.encode_second(got, got.amax(dim=1), got.amax(dim=0)), packed)


def test_what_is_zero_stays_zero():
    zero = torch.zeros(4, 64)
    assert torch.equal(fourbit.decode_first(*fourbit.encode_first(zero), (4, 64)), zero)
    packed = fourbit.encode_second(zero, zero[:, 0], zero[0])
    assert torch.equal(fourbit.decode_second(packed, zero[:, 0], zero[0]), zero)
