import weakref

import pytest
import torch

from qgalore.errors import ConfigError
from qgalore.quant import int8, int8_products

SHAPES = [(1, 8, 8), (5, 24, 40), (16, 136, 8), (33, 40, 72), (70, 1000, 16)]
EPS = 2.0**-24  # half a step of fp32


def operands(tokens, width, rows, device, dtype=torch.float32):
    """x, dY, q, scale: Gaussian, with tokens of very different sizes."""
    generator = torch.Generator().manual_seed(tokens + width)
    sizes = 10.0 ** torch.linspace(-6, 3, tokens).unsqueeze(1)
    x, grad = (torch.randn(tokens, side, generator=generator) * sizes for side in (width, rows))
    q, scale = int8.quantize(torch.randn(rows, width, generator=generator), width)
    return x.to(device, dtype), grad.to(device, dtype), q.to(device), scale.to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_the_exact_integer_sums_scaled(shape, dtype, device):
    """The specification in int64 and fp64. Three fp32 roundings, a sum with the bias, one rounding to the dtype."""
    x, grad, q, scale = operands(*shape, device, dtype)
    bias = torch.randn(shape[2], device=device).to(dtype)
    integers, step = int8_products.round_tokens(x)
    exact = (integers.cpu().long() @ q.cpu().long().T).double() * step.cpu().double() * scale.cpu().double().T
    for b in (None, bias):
        wanted = exact if b is None else exact + b.cpu().double()
        found = int8_products.output(x, q, scale, b)
        assert found.dtype == dtype
        slack = 4 * EPS * (exact.abs() + wanted.abs()) + torch.finfo(dtype).eps / 2 * wanted.abs()
        assert ((found.cpu().double() - wanted).abs() <= slack * 1.01).all()
    integers, step = int8_products.round_tokens(grad * scale.T.float())
    wanted = (integers.cpu().long() @ q.cpu().long()).double() * step.cpu().double()
    found = int8_products.input_gradient(grad, q, scale, dtype)
    assert ((found.cpu().double() - wanted).abs() <= (3 * EPS + torch.finfo(dtype).eps / 2) * wanted.abs() * 1.01).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_errors_stay_within_half_a_step_of_every_term(shape, device):
    """A rounded value is off by half its token's step at most, so a sum by half a step times Σ |weights|."""
    x, grad, q, scale = (value.double() for value in operands(*shape, device))
    weight = q * scale
    fp32 = 1 + 1e-5
    error = (int8_products.output(x.float(), q.to(torch.int8), scale.bfloat16()).double() - x @ weight.T).abs()
    step = x.abs().amax(1, keepdim=True) / 127
    assert (error <= (step / 2 * weight.abs().sum(1) + 1e-6 * (x.abs() @ weight.abs().T)) * fp32).all()
    folded = grad * scale.T
    found = int8_products.input_gradient(grad.float(), q.to(torch.int8), scale.bfloat16(), torch.float32)
    step = folded.abs().amax(1, keepdim=True) / 127
    bound = step / 2 * q.abs().sum(0) + 1e-6 * (grad.abs() @ weight.abs())
    assert ((found.double() - grad @ weight).abs() <= bound * fp32).all()


def test_the_error_of_gaussian_tokens_is_that_of_uniform_rounding(device):
    """Independent rounding errors of step²/12 each: 8,000 tokens hold the mean to a few per mille."""
    torch.manual_seed(0)
    x = torch.randn(8000, 64, device=device)
    q, scale = int8.quantize(torch.randn(48, 64), 64)
    q, scale = q.to(device), scale.to(device)
    wanted = x @ int8.dequantize(q, scale).T
    squares = (int8_products.output(x, q, scale) - wanted).square().mean()
    step = x.abs().amax(1) / 127
    predicted = step.square().mean() / 12 * int8.dequantize(q, scale).square().sum(1).mean()
    assert float(squares / predicted) == pytest.approx(1, rel=0.02)


def test_zeros_stay_zero_and_what_is_not_finite_is_seen(device):
    x, _, q, scale = operands(6, 16, 8, device)
    x[0], x[1, 3], x[2, 5], x[3] = 0.0, float("inf"), float("nan"), 1e-42
    y = int8_products.output(x, q, scale)
    assert torch.equal(y[0], torch.zeros(8, device=device))
    assert not y[1:3].isfinite().any()
    assert y[3:].isfinite().all()
    assert float(y[3].abs().max()) < 1e-37  # below the smallest normal number values may be lost, never wrapped


@pytest.fixture
def rounds(monkeypatch):
    """A list that grows with each rounding of tokens."""
    calls, own = [], int8_products.round_tokens
    monkeypatch.setattr(int8_products, "round_tokens", lambda *given: calls.append(None) or own(*given))
    return calls


def test_products_of_the_very_same_tokens_round_them_once(rounds, device):
    """Bit for bit what they are with tokens rounded each time. Equal values in another tensor are rounded anew, and so
    is a tensor that has changed."""
    x, _, q, scale = operands(33, 40, 72, device)
    first, again = (int8_products.output(x, q, scale) for _ in range(2))
    assert len(rounds) == 1
    other = int8_products.output(x.clone(), q, scale)
    assert torch.equal(first, again)
    assert torch.equal(first, other)
    int8_products.output(x, q, scale)
    assert len(rounds) == 3
    x.mul_(2.0)
    assert torch.equal(int8_products.output(x, q, scale), 2 * first)
    assert len(rounds) == 4


def test_rounded_tokens_live_no_longer_than_they_and_no_backward_pass_sees_them(rounds, device):
    x, grad, q, scale = operands(33, 40, 72, device)
    int8_products.output(x, q, scale)
    kept = weakref.ref(int8_products.round_once(x)[0])
    assert kept() is not None
    del x
    assert kept() is None
    int8_products.output(grad[:, :40], q, scale)
    kept = weakref.ref(int8_products.round_once(grad)[0])
    int8_products.input_gradient(grad, q, scale, torch.float32)
    assert kept() is None
    with torch.inference_mode():  # whose tensors know no versions
        held = torch.randn(33, 40, device=device)
        before = len(rounds)
        int8_products.output(held, q, scale)
        int8_products.output(held, q, scale)
    assert len(rounds) == before + 2


@pytest.mark.parametrize("shape", [(12, 8), (8, 20), (8, 133_168)])
def test_shapes_that_cannot_be_multiplied_are_named(shape):
    assert int8_products.obstacle(*shape)
    assert int8_products.obstacle(8, 133_144) is None


def test_a_device_whose_products_are_wrong_is_refused(monkeypatch, device):
    int8_products.check(device)
    right = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: right(a, b) + (a.shape[1] > 200))
    with pytest.raises(ConfigError, match=r"a product of 64 × 256 × 128 is wrong; set it to bf16, or install Triton"):
        int8_products.check(device)

    def missing(a, b):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(torch, "_int_mm", missing)
    with pytest.raises(ConfigError, match="no kernel"):
        int8_products.check(device)
