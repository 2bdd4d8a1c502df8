"""Stored momenta against a value-by-value oracle, and what their rounding must not do: lean, or forget a size."""

import math

import pytest
import torch

from qgalore.quant.counter import derive_key, random_bits, uniform
from qgalore.quant.int8 import group_size_for
from qgalore.quant.momentum import FORMATS, StoredMomentum

SHAPES = ((24, 256), (7, 96), (5, 33), (64, 1), (1, 128))
KEY = derive_key(3, 5, 0)


def uneven(rows, columns, seed=0):
    """A Gaussian matrix whose rows and columns differ in size by factors of up to a thousand."""
    g = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=g)
    return matrix * torch.logspace(-2, 1, rows)[:, None] * torch.logspace(0, -2, columns)[None]


def stored(matrix, fmt, key=KEY):
    kept = StoredMomentum(*matrix.shape, fmt)
    kept.write(matrix, key)
    return kept


def oracle_4bit(matrix, key):
    """The code of the module's docstring, one value at a time in Python's own numbers."""
    m, n = matrix.shape
    group = group_size_for(n)
    b = matrix.double().tolist()
    u = (uniform(random_bits(key, 0, m * n)) - 1).double().view(m, n).tolist()
    r = [math.sqrt(sum(x * x for x in row) / n) for row in b]
    k = [math.sqrt(sum((b[i][j] / r[i]) ** 2 for i in range(m)) / m) for j in range(n)]
    out = torch.zeros(m, n, dtype=torch.float64)
    for i in range(m):
        for start in range(0, n, group):
            v = [b[i][j] / (r[i] * k[j]) for j in range(start, start + group)]
            s = float(torch.tensor(max(map(abs, v)) * (1 + 2**-8)).to(torch.bfloat16))
            for j, x in zip(range(start, start + group), v, strict=True):
                code = min(7, max(-8, round(7.5 * x / s + u[i][j])))
                out[i, j] = r[i] * k[j] * s * (code - u[i][j]) / 7.5
    return out


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_four_bits_equal_the_oracle(shape):
    matrix = uneven(*shape)
    read = stored(matrix, "4bit").read(KEY).double()
    expected = oracle_4bit(matrix, KEY)
    # A value on the edge between two codes may fall either way in fp32; all others agree to fp32's precision.
    off = (read - expected).abs() > 1e-5 * expected.abs().amax()
    assert off.float().mean() < 1e-3


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("fmt", FORMATS)
def test_what_is_written_is_read(fmt, shape):
    matrix = uneven(*shape)
    read = stored(matrix, fmt).read(KEY)
    assert read.shape == matrix.shape
    assert read.dtype == torch.float32
    if fmt == "4bit":  # half a step of the largest in the row, in units of the row's and the column's size
        r = matrix.square().mean(1).sqrt()[:, None]
        k = (matrix / r).square().mean(0).sqrt()
        step = (matrix / r / k).abs().amax(dim=1, keepdim=True) * r * k * (1 / 15 + 2**-7)
    else:
        step = (
            matrix.abs().amax(dim=1, keepdim=True)
            * {"8bit": (1 + 2**-7) / 127, "bf16": 2**-8, "fp32": 0.0}[fmt]
            * 1.001
        )
    assert ((read - matrix).abs() <= step).all()


@pytest.mark.parametrize("fmt", ["4bit", "8bit"])
def test_rounding_does_not_lean(fmt):
    """The mean over many keys is the matrix: each error has mean zero and at most a uniform one's variance."""
    matrix, draws = uneven(4, 128), 2000
    keys = [derive_key(0, step, 0) for step in range(draws)]
    errors = torch.stack([stored(matrix, fmt, key).read(key) - matrix for key in keys])
    spread = errors.std(dim=0).clamp_min(1e-12)
    z = errors.mean(dim=0) / (spread / math.sqrt(draws))
    assert z.abs().mean() < 1.0  # 0.8 for unbiased errors
    largest = matrix.abs() >= matrix.abs().amax(dim=1, keepdim=True)  # which a scale that was rounded down would cut
    assert z[largest].abs().max() < 4.0


def test_the_error_of_four_bits_does_not_depend_on_the_value():
    """Subtractive dither: a uniform error whatever the value, where nearest rounding gives zero error at the codes."""
    matrix = torch.full((64, 128), 1.0)
    matrix[:, ::2] *= -1
    matrix[:, 5] = 0.0
    errors = []
    for step in range(200):
        key = derive_key(1, step, 0)
        errors.append(stored(matrix, "4bit", key).read(key)[:, 6] - matrix[:, 6])
    errors = torch.cat(errors)
    step = 1 / 7.5
    assert errors.std() == pytest.approx(step / math.sqrt(12), rel=0.1)


def test_a_read_with_another_key_is_wrong():
    """The dither must be the writer's own; this is what a checkpoint's step of the last write is for."""
    matrix = uneven(16, 128)
    kept = stored(matrix, "4bit")
    right = (kept.read(KEY) - matrix).norm()
    assert (kept.read(derive_key(3, 6, 0)) - matrix).norm() > 1.2 * right


def test_row_and_column_sizes_are_taken_out():
    """On uneven matrices one scale a group loses several times as much as row, column and group scales do."""
    matrix = uneven(128, 128)
    size = matrix.norm(dim=1, keepdim=True) * matrix.norm(dim=0)
    ours = ((stored(matrix, "4bit").read(KEY) - matrix) / size).norm()
    scale = matrix.abs().amax(dim=1, keepdim=True)
    plain = ((scale * (7.5 * matrix / scale).round() / 7.5 - matrix) / size).norm()
    assert ours < plain / 3


@pytest.mark.parametrize("fmt", FORMATS)
def test_zeros_stay_zero(fmt):
    assert not stored(torch.zeros(8, 128), fmt).read(KEY).any()
    matrix = uneven(8, 128)
    matrix[2] = 0
    matrix[:, 7] = 0
    read = stored(matrix, fmt).read(KEY)
    assert not read[2].any()
    assert not read[:, 7].any()


def test_bytes_a_value():
    for fmt, limit in (("4bit", 0.52), ("8bit", 1.016), ("bf16", 2.0), ("fp32", 4.0)):
        tensors = StoredMomentum(1024, 1024, fmt).tensors().values()
        assert sum(t.numel() * t.element_size() for t in tensors) / 1024**2 <= limit + 0.004
