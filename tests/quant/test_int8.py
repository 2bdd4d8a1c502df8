import pytest
import torch

from qgalore.quant import int8
from qgalore.quant.counter import derive_key

ODD_SHAPES = [(5, 128), (3, 96), (7, 33), (1, 1), (64, 2736), (9, 5461), (513, 64)]


def grid(shape, device="cpu", seed=0, std=0.02, group=128):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul_(std).to(device)
    return weight, *int8.quantize(weight, int8.group_size_for(shape[1], group))


def no_update(width, device="cpu"):
    return lambda a, b: torch.zeros(b - a, width, device=device)


@pytest.mark.parametrize(
    ("width", "wanted", "used"),
    [(256, 128, 128), (704, 128, 64), (2736, 128, 2736), (5461, 128, 5461), (96, 64, 32), (256, "row", 256)],
)
def test_group_size_falls_back(width, wanted, used):
    assert int8.group_size_for(width, wanted) == used


def test_group_size_must_be_known():
    with pytest.raises(ValueError, match="100"):
        int8.group_size_for(256, 100)


@pytest.mark.parametrize("shape", ODD_SHAPES)
@pytest.mark.parametrize("group", [128, 64, 32, "row"])
def test_quantization_error_is_half_a_step(shape, group, device):
    weight, q, scale = grid(shape, device, group=group)
    assert q.dtype == torch.int8
    assert scale.dtype == torch.bfloat16
    step = scale.float().repeat_interleave(shape[1] // scale.shape[1], dim=1)
    # half a step, and fp32's error of the division that chose the integer
    assert bool(((int8.dequantize(q, scale) - weight).abs() <= step * 0.5 * (1 + 1e-5)).all())
    assert int(q.abs().max()) <= 127


def test_against_a_brute_force_quantizer():
    weight, q, scale = grid((4, 64), group=32)
    for row in range(4):
        for column in range(64):
            s = float(scale[row, column // 32])
            candidates = torch.arange(-127, 128) * s
            best = int((candidates - weight[row, column]).abs().argmin()) - 127
            assert int(q[row, column]) == best


def test_scales_leave_head_room_and_stay_exact_in_fp16():
    q = grid((64, 256))[1]
    assert 113 <= int(q.abs().amax()) <= 117  # 127 / 1.1 = 115.5, bf16 rounds the scale by up to 0.4 %
    tiny = int8.scale_for(torch.tensor([0.0, 1e-9, 1e9]))
    assert tiny.tolist() == [2.0**-17, 2.0**-17, 65280.0]
    everything = torch.arange(0x3700, 0x477F + 1, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    assert float(everything[0]) == 2.0**-17
    assert float(everything[-1]) == 65280.0
    assert torch.equal(everything.to(torch.float16).float(), everything.float())


def test_dequantization_is_exact_in_fp32_and_rounded_once_in_bf16():
    _, q, scale = grid((8, 256))
    exact = q.double() * scale.double().repeat_interleave(128, dim=1)
    assert torch.equal(int8.dequantize(q, scale).double(), exact)
    assert torch.equal(int8.dequantize(q, scale, torch.bfloat16), exact.to(torch.bfloat16))


def test_quantize_refuses_what_it_cannot_store():
    with pytest.raises(ValueError, match="does not divide"):
        int8.quantize(torch.zeros(2, 48), 32)
    with pytest.raises(ValueError, match="inf or nan"):
        int8.quantize(torch.tensor([[1.0, float("nan")]]), 2)


@pytest.mark.parametrize("shape", ODD_SHAPES)
def test_zero_update_keeps_every_integer(shape, device):
    _, q, scale = grid(shape, device)
    before = q.clone(), scale.clone()
    for step in range(5):
        int8.write_back(q, scale, no_update(shape[1], device), shrink=0.0, key=derive_key(0, step))
    assert torch.equal(q, before[0])
    assert torch.equal(scale, before[1])


def test_zero_update_after_a_random_walk_keeps_every_integer(device):
    """Also for groups whose scale has just changed, or that sit at the edge of changing."""
    _, q, scale = grid((32, 128), device)
    generator = torch.Generator().manual_seed(3)
    for step in range(60):
        change = torch.randn(32, 128, generator=generator).mul_(0.01 * (1.5 if step < 30 else -0.5)).to(device)
        int8.write_back(q, scale, lambda a, b, c=change: c[a:b], shrink=0.05, key=derive_key(1, step))
        settled = q.clone(), scale.clone()
        int8.write_back(q, scale, no_update(128, device), shrink=0.0, key=derive_key(2, step))
        assert torch.equal(q, settled[0])
        assert torch.equal(scale, settled[1])


@pytest.mark.parametrize("size", [0.3, 0.01, 1e-4, -1e-4, 1.7])
def test_write_back_is_unbiased(size, device):
    """Mean over 100k draws of an update of ``size`` grid steps, within five standard errors of a Bernoulli mean."""
    rows = 1000
    q = torch.full((rows, 100), 100, dtype=torch.int8, device=device)
    scale = torch.full((rows, 1), 2.0**-7, dtype=torch.bfloat16, device=device)
    update = torch.full((rows, 100), size * 2.0**-7, device=device)
    int8.write_back(q, scale, lambda a, b: update[a:b], shrink=0.0, key=derive_key(4, 2))
    mean = float(q.double().mean()) - 100
    fraction = size % 1
    assert abs(mean - size) <= 5 * (fraction * (1 - fraction) / (rows * 100)) ** 0.5
    assert set((q.int() - 100).unique().tolist()) <= {int(size // 1), int(size // 1) + 1}


def test_decay_is_unbiased_and_comes_before_the_update(device):
    rows, width = 2000, 64
    weight = torch.linspace(-1, 1, width, device=device).repeat(rows, 1)
    q, scale = int8.quantize(weight, 64)
    before = int8.dequantize(q, scale).double()
    update = torch.full((rows, width), 0.003, device=device)
    int8.write_back(q, scale, lambda a, b: update[a:b], shrink=0.01, key=derive_key(8))
    wanted = before[0] * 0.99 + 0.003
    error = int8.dequantize(q, scale).double().mean(0) - wanted
    standard_error = float(scale[0, 0]) * 0.5 / rows**0.5
    assert float(error.abs().max()) <= 5 * standard_error


def test_an_outgrown_group_changes_its_scale_and_no_other(device):
    weight, q, scale = grid((2, 256), device)
    before = scale.clone()
    update = torch.zeros(2, 256, device=device)
    update[0, 3] = 1.0
    int8.write_back(q, scale, lambda a, b: update[a:b], shrink=0.0, key=derive_key(0))
    changed = scale != before
    assert changed.tolist() == [[True, False], [False, False]]
    assert abs(float(int8.dequantize(q, scale)[0, 3]) - float(weight[0, 3]) - 1.0) <= float(scale[0, 0])


def test_a_shrunken_group_regains_its_resolution(device):
    _, q, scale = grid((1, 128), device)
    before = float(scale[0, 0])
    int8.write_back(q, scale, no_update(128, device), shrink=0.6, key=derive_key(0))
    assert float(scale[0, 0]) == pytest.approx(0.4 * before, rel=0.02)
    assert int(q.abs().max()) > 100


def test_tiles_do_not_show(device, monkeypatch):
    update = torch.randn(37, 96, generator=torch.Generator().manual_seed(1)).mul_(0.01).to(device)
    results = []
    for tile in (1 << 20, 96 * 5, 1):
        monkeypatch.setattr(int8, "TILE_ELEMENTS", tile)
        _, q, scale = grid((37, 96), device)
        int8.write_back(q, scale, lambda a, b: update[a:b], shrink=0.001, key=derive_key(6))
        results.append((q, scale))
    for q, scale in results[1:]:
        assert torch.equal(q, results[0][0])
        assert torch.equal(scale, results[0][1])


def test_rederived_scales_follow_absmax_and_clip_nothing(device):
    """Scales are the absmax of the exact sum over 127, with bf16's room; integers are next to it; the mean is right."""
    rows, width = 500, 64
    weight = torch.linspace(-1, 1, width, device=device).repeat(rows, 1)
    q, scale = int8.quantize(weight, 32)
    wanted = int8.dequantize(q, scale) * 0.99 + 0.003
    update = torch.full((rows, width), 0.003, device=device)
    key = derive_key(5)
    int8.write_back(q, scale, lambda a, b: update[a:b], shrink=0.01, key=key, scales="rederived")
    peak = wanted.view(rows, 2, 32).abs().amax(dim=2)
    # bf16 keeps 8 bits: two roundings of nearly the same number are at most one step of 2⁻⁷ apart
    torch.testing.assert_close(scale.float(), peak * (1 + 2.0**-8) / 127, rtol=2.0**-7, atol=0)
    assert bool((peak / scale.float() <= 127).all())  # so the largest weight was not cut
    error = int8.dequantize(q, scale) - wanted
    step = scale.float().repeat_interleave(32, dim=1)
    assert bool((error.abs() <= step * (1 + 1e-5)).all())
    assert float(error.mean(0).abs().max()) <= 5 * float(step.max()) * 0.5 / rows**0.5


def test_rederived_scales_round_weights_without_an_update_again(device):
    """What sticky ones are for; and they are sticky unless asked otherwise."""
    moved = {}
    for scales in int8.SCALES:
        _, q, scale = grid((64, 128), device)
        before = int8.dequantize(q, scale)
        for step in range(3):
            int8.write_back(q, scale, no_update(128, device), shrink=0.0, key=derive_key(step), scales=scales)
        moved[scales] = float((int8.dequantize(q, scale) - before).abs().mean() / scale.float().mean())
    assert moved["sticky"] == 0
    assert moved["rederived"] > 0.1  # of a step: one stochastic rounding from elsewhere is off by 1/3 of it on average


@pytest.mark.parametrize("scales", int8.SCALES)
@pytest.mark.parametrize("shape", ODD_SHAPES)
def test_nearest_rounding_ends_within_half_a_step_of_the_sum(shape, scales, device):
    _, q, scale = grid(shape, device)
    update = torch.randn(shape, generator=torch.Generator().manual_seed(2)).mul_(0.01).to(device)
    wanted = int8.dequantize(q, scale).double() * 0.9 + update
    how = {"rounding": "nearest", "scales": scales}
    int8.write_back(q, scale, lambda a, b: update[a:b], shrink=0.1, key=derive_key(1), **how)
    step = scale.double().repeat_interleave(shape[1] // scale.shape[1], dim=1)
    # fp32 at 127 resolves 2⁻¹⁷ of a step; three operations there
    assert bool(((int8.dequantize(q, scale).double() - wanted).abs() <= step * (0.5 + 3 * 2.0**-17)).all())


def test_nearest_rounding_discards_what_is_small_for_ever(device):
    """The negative control: 50 updates of 0.4 of a step, in one direction, move nothing."""
    _, q, scale = grid((8, 128), device)
    before = q.clone()
    update = 0.4 * scale.float().repeat_interleave(128, dim=1)
    for step in range(50):
        int8.write_back(q, scale, lambda a, b: update[a:b], shrink=0.0, key=derive_key(step), rounding="nearest")
    assert torch.equal(q, before)


TINY = 2.5e-6  # a fine-tuning step: lr 1e-5 at scale 0.25, about a two-hundredth of an int8 step of weights like grid's


def after_tiny_updates(group, steps=60):
    """Weights (64, 512) before and after ``steps`` updates of ±``TINY``, and each weight's grid step and sign."""
    _, q, scale = grid((64, 512), group=group)
    signs = torch.randn(64, 512, generator=torch.Generator().manual_seed(5)).sign()
    before = int8.dequantize(q, scale)
    for step in range(steps):
        int8.write_back(q, scale, lambda a, b: TINY * signs[a:b], shrink=0.0, key=derive_key(9, step))
    return before, int8.dequantize(q, scale), int8.dequantize(torch.ones_like(q), scale), signs


@pytest.mark.parametrize("group", [128, 64, 32, "row"])
def test_tiny_updates_arrive_on_average_and_drift_as_reckoned(group):
    """An update u < s moves a weight by s with probability u/s: mean u, variance u (s − u), and steps are independent,
    so k of them give k u and k u (s − u). A count of mean m = k u/s has a kurtosis of about 3 + 1/m, so the mean square
    of n of them has a relative standard error of √((2 + 1/m)/n)."""
    before, after, step, signs = after_tiny_updates(group)
    moved = (after - before).double() * signs
    variance = 60 * TINY * (step - TINY).double()
    assert abs(float((moved - 60 * TINY).mean())) <= 5 * float(variance.mean() / moved.numel()) ** 0.5
    smallest = 60 * TINY / float(step.max())
    ratio = float(((moved - 60 * TINY).square() / variance).mean())
    assert abs(ratio - 1) <= 5 * ((2 + 1 / smallest) / moved.numel()) ** 0.5
