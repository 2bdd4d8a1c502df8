"""Orthogonalisation against singular value decomposition: directions stay, sizes go near one."""

import pytest
import torch

from qgalore.lowrank.rules.orthogonal import SEQUENCES, orthogonalize

SHAPES = ((40, 64), (64, 40), (33, 33), (1, 7), (7, 1))


def with_values(shape, values, seed=0):
    g = torch.Generator().manual_seed(seed)
    u, _ = torch.linalg.qr(torch.randn(shape[0], min(shape), generator=g, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(shape[1], min(shape), generator=g, dtype=torch.float64))
    return u, values.double(), v


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("iterations", [3, 5])
@pytest.mark.parametrize("sequence", sorted(SEQUENCES))
def test_singular_values_follow_the_polynomials_and_vectors_stay(shape, sequence, iterations):
    u, s, v = with_values(shape, torch.logspace(0, -2.5, min(shape)))
    matrix = u @ s.diag() @ v.T
    x = s / s.norm()
    for a, b, c in SEQUENCES[sequence][:iterations]:
        x = a * x + b * x**3 + c * x**5
    found = orthogonalize(matrix.float(), iterations, sequence)
    # fp32 rounding of each value is amplified by the polynomials' slope at zero, 8^5 at most for values near it
    torch.testing.assert_close(found.double(), u @ x.diag() @ v.T, atol=2e-3, rtol=0)


def test_five_minimax_polynomials_bring_a_thousandfold_range_near_one():
    x = torch.logspace(-3, 0, 20001, dtype=torch.float64)
    for a, b, c in SEQUENCES["polar_express"][:5]:
        x = a * x + b * x**3 + c * x**5
    assert x.min() > 0.84
    assert x.max() < 1.13


def test_each_polynomial_is_the_best_of_its_degree():
    """A minimax polynomial's error equi-oscillates: 1 − p takes ± the same extreme at four points of its interval."""
    a, b, c = (value * 1.01**power for value, power in zip(SEQUENCES["polar_express"][0], (1, 3, 5), strict=True))
    x = torch.linspace(0, 1, 400001, dtype=torch.float64)
    p = a * x + b * x**3 + c * x**5
    inner = p[(x > 0.02)]
    low, high = inner[: len(inner) * 3 // 4].max(), p[-1]
    assert low == pytest.approx(float(high), rel=0.01)


def test_a_batch_is_its_matrices():
    g = torch.Generator().manual_seed(1)
    batch = torch.randn(3, 24, 40, generator=g)
    torch.testing.assert_close(orthogonalize(batch), torch.stack([orthogonalize(m) for m in batch]))


def test_size_does_not_matter_and_zero_stays_zero():
    g = torch.Generator().manual_seed(2)
    matrix = torch.randn(16, 24, generator=g)
    torch.testing.assert_close(orthogonalize(matrix * 2.0**-40), orthogonalize(matrix))
    assert not orthogonalize(torch.zeros(4, 8)).any()


def test_bf16_products_stay_close():
    g = torch.Generator().manual_seed(3)
    matrix = torch.randn(128, 96, generator=g)
    exact, rounded = orthogonalize(matrix), orthogonalize(matrix, dtype=torch.bfloat16)
    cosine = (exact * rounded).sum() / exact.norm() / rounded.norm()
    assert cosine > 0.999


def test_iterations_are_checked():
    with pytest.raises(ValueError, match="between 1 and 6"):
        orthogonalize(torch.ones(2, 2), 7)
