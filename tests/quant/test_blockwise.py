import bitsandbytes.functional as bnb
import pytest
import torch

from qgalore.quant import blockwise


def values_around_every_rounding_point(code: torch.Tensor) -> torch.Tensor:
    """The midpoints of neighbouring codes and the three floats on either side, the codes, and values of all sizes."""
    middles = (code[1:] + code[:-1]) / 2
    found, above, below = [code, middles], middles, middles
    for _ in range(3):
        above, below = above.nextafter(torch.tensor(2.0)), below.nextafter(torch.tensor(-2.0))
        found += [above, below]
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(50_000, generator=generator) * torch.randn(50_000, generator=generator).mul(4).exp()
    found += [spread / spread.abs().max(), torch.tensor([0.0, -0.0, 1e-40, -1e-40, 1.0, -1.0])]
    return torch.cat(found)


def in_blocks_of_unit_peak(values: torch.Tensor) -> torch.Tensor:
    """(blocks, 256): 255 values and a one, so that the values are not scaled."""
    padded = torch.nn.functional.pad(values, (0, -len(values) % 255)).view(-1, 255)
    return torch.nn.functional.pad(padded, (0, 1), value=1.0)


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_is_bitsandbytes(signed):
    assert torch.equal(blockwise.dynamic_map(signed), bnb.create_dynamic_map(signed=signed))


@pytest.mark.parametrize("signed", [True, False])
def test_every_value_gets_the_nearest_code(signed):
    code = blockwise.dynamic_map(signed)
    values = values_around_every_rounding_point(code)
    x = in_blocks_of_unit_peak(values if signed else values.abs())
    codes, absmax = blockwise.quantize(x, code)
    assert bool((absmax == 1).all())
    # argmin takes the first, so the lower, of two codes at equal fp32 distance
    nearest = torch.stack([(row[:, None] - code).abs().argmin(dim=1) for row in x])
    if not signed:  # but a positive second moment stays positive
        nearest[x > 0] = nearest[x > 0].clamp(min=1)
    assert torch.equal(codes.long(), nearest)
    assert torch.equal(blockwise.nearest_code(x, code), nearest)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("count", [1, 255, 256, 257, 5000, 3 * blockwise.TILE + 300])
def test_decoding_is_within_half_a_step_and_equals_bitsandbytes(signed, count):
    code = blockwise.dynamic_map(signed)
    x = torch.randn(count, generator=torch.Generator().manual_seed(count))
    x = x if signed else x.square()
    codes, absmax = blockwise.quantize(x, code)
    decoded = blockwise.dequantize(codes, absmax, code)
    assert torch.equal(decoded, bnb.dequantize_blockwise(codes, absmax=absmax, code=code, blocksize=256))
    half_step = (code[1:] - code[:-1]).max() / 2
    allowed = absmax.repeat_interleave(256)[:count] * (half_step + 2.0**-22)  # 2⁻²²: scaling there and back in fp32
    assert bool(((decoded - x).abs() <= allowed).all())
    again, absmax_again = blockwise.quantize(decoded, code)
    if not signed:  # a signed map ends at −0.993, so a block whose peak is negative shrinks when coded anew
        assert torch.equal(again, codes)
        assert torch.equal(absmax_again, absmax)


def test_zero_and_tiny_blocks_stay_finite():
    for signed in (True, False):
        code = blockwise.dynamic_map(signed)
        for value in (0.0, 1e-45, 1e-39):
            decoded = blockwise.dequantize(*blockwise.quantize(torch.full((300,), value), code), code)
            assert bool(((decoded >= 0) & (decoded <= value)).all())


def test_a_positive_second_moment_stays_positive():
    code = blockwise.dynamic_map(signed=False)
    x = torch.tensor([1.0, 1e-9, 1e-30, 0.0])
    decoded = blockwise.dequantize(*blockwise.quantize(x, code), code)
    assert (decoded > 0).tolist() == [True, True, True, False]


def test_negative_values_take_the_lowest_code_of_a_map_without_them():
    code = blockwise.dynamic_map(signed=False)
    codes, _ = blockwise.quantize(torch.tensor([-1.0, 1.0]), code)
    assert codes.tolist() == [0, 255]


def test_a_map_finer_than_the_cells_is_refused():
    with pytest.raises(ValueError, match="closer than"):
        blockwise.cell_table(torch.linspace(0.5, 1.0, 256))
