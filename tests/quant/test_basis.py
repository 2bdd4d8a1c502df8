import pytest
import torch
from scipy.stats import norm

from qgalore.quant import basis

SHAPES = [(8, 128), (3, 33), (5, 2736), (1, 1), (16, 96)]


def vectors(shape, device="cpu"):
    return torch.nn.functional.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(2)), dim=1).to(
        device
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_packing_is_half_a_byte_a_value_and_invertible(shape, device):
    codes = torch.randint(0, 16, shape, dtype=torch.uint8, device=device)
    packed = basis.pack_nibbles(codes)
    assert packed.untyped_storage().nbytes() == shape[0] * ((shape[1] + 1) // 2)
    assert torch.equal(basis.unpack_nibbles(packed, shape[1]), codes)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fmt", ["int4", "nf4"])
def test_stored_bytes(shape, fmt):
    codes, scale = basis.encode(vectors(shape), fmt)
    assert codes.untyped_storage().nbytes() == shape[0] * ((shape[1] + 1) // 2)
    assert scale.dtype == torch.bfloat16
    empty_codes, empty_scale = basis.empty(*shape, fmt)
    assert (codes.shape, scale.shape) == (empty_codes.shape, empty_scale.shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_int4_error_is_half_a_step(shape, device):
    v = vectors(shape, device)
    codes, scale = basis.encode(v, "int4")
    step = scale.float().repeat_interleave(shape[1] // scale.shape[1], dim=1)
    # half a step, plus what bf16's rounding of the scale (2⁻⁹) clips off the largest value, 7 steps away
    assert bool(((basis.decode(codes, scale, shape[1], "int4") - v).abs() <= step * (0.5 + 7 * 2.0**-8)).all())


def test_nf4_takes_the_nearest_code_and_beats_int4_on_gaussians():
    v = vectors((16, 1024))
    error = {}
    for fmt in ("int4", "nf4"):
        codes, scale = basis.encode(v, fmt)
        error[fmt] = float((basis.decode(codes, scale, 1024, fmt) - v).square().mean())
    assert error["nf4"] < error["int4"]
    codes, scale = basis.encode(v, "nf4")
    unit = v / scale.float().repeat_interleave(128, dim=1)
    nearest = (unit.unsqueeze(-1) - torch.tensor(basis.NF4_CODE)).abs().argmin(-1)
    assert torch.equal(basis.unpack_nibbles(codes, 1024).long(), nearest)


def test_nf4_code_is_the_normal_quantiles():
    """QLoRA, appendix E: quantiles of the normal, normalised; 8 positive levels, 7 negative and zero."""
    top = (1 - 1 / 32 + 1 - 1 / 30) / 2
    positive = norm.ppf(torch.linspace(top, 0.5, 9)[:-1].numpy())
    negative = -norm.ppf(torch.linspace(top, 0.5, 8)[:-1].numpy())
    code = torch.tensor(sorted([*positive, 0.0, *negative]))
    code = code / code.abs().max()
    torch.testing.assert_close(torch.tensor(basis.NF4_CODE).double(), code.double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("fmt", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_float_formats_only_round(fmt, dtype):
    v = vectors((4, 40))
    codes, scale = basis.encode(v, fmt)
    assert scale is None
    assert torch.equal(basis.decode(codes, scale, 40, fmt), v.to(dtype).float())


def test_zero_vectors_and_unknown_formats():
    codes, scale = basis.encode(torch.zeros(2, 64), "int4")
    assert torch.equal(basis.decode(codes, scale, 64, "int4"), torch.zeros(2, 64))
    with pytest.raises(ValueError, match="fp8"):
        basis.empty(2, 64, "fp8")
