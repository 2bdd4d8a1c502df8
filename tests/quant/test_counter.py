import pytest
import torch
from scipy import stats

from qgalore.quant.counter import MAX_ELEMENTS, derive_key, random_bits, uniform


def test_bits_are_a_function_of_the_element_alone(device):
    key = derive_key(1, 2, 3)
    whole = random_bits(key, 0, 1000, device)
    parts = torch.cat([random_bits(key, a, 1000 // 8, device) for a in range(0, 1000, 125)])
    assert torch.equal(whole, parts)


def test_known_values_are_stable():
    # A change of these silently changes every resumed run: they pin the stream, and every device must give them.
    assert derive_key(0, 0, 0) == derive_key(0, 0, 0)
    bits = random_bits((1, 2), 0, 3)
    reference = []
    for index in range(3):
        x = index ^ 1
        for add in (None, 2):
            x = x if add is None else (x + add) & 0xFFFFFFFF
            x ^= x >> 16
            x = x * 0x7FEB352D & 0xFFFFFFFF
            x ^= x >> 15
            x = x * 0x846CA68B & 0xFFFFFFFF
            x ^= x >> 16
        reference.append(x - (1 << 32) if x >= 1 << 31 else x)
    assert bits.tolist() == reference


def test_uniform_is_uniform_and_open(device):
    u = uniform(random_bits(derive_key(5), 0, 200_000, device)).cpu()
    assert float(u.min()) > 0
    assert float(u.max()) < 1
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-3


def test_streams_of_neighbouring_keys_are_independent(device):
    n = 100_000
    streams = [uniform(random_bits(derive_key(*parts), 0, n, device)) for parts in ((0, 0, 0), (0, 0, 1), (0, 1, 0))]
    streams.append(torch.roll(streams[0], 1))
    correlation = torch.corrcoef(torch.stack(streams)).cpu()
    off_diagonal = correlation - torch.eye(4)
    assert float(off_diagonal.abs().max()) < 5 / n**0.5  # five standard errors of a zero correlation


def test_every_bit_is_fair(device):
    n = 200_000
    bits = random_bits(derive_key(9, 9), 0, n, device)
    for position in range(32):
        share = float(((bits >> position) & 1).float().mean())
        assert abs(share - 0.5) < 5 * 0.5 / n**0.5


def test_a_stream_has_an_end():
    with pytest.raises(ValueError, match="elements"):
        random_bits((0, 0), MAX_ELEMENTS, 1)
