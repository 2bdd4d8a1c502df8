import random

from qgalore.training.spikes import LEAST, is_spike

RNG = random.Random(0)
NOISY = [3.0 + RNG.gauss(0, 0.1) for _ in range(200)]


def test_noise_is_no_spike_and_a_jump_is():
    assert not any(is_spike(NOISY[:i], NOISY[i], 6.0) for i in range(1, 200))
    assert is_spike(NOISY, 3.9, 6.0)
    assert not is_spike(NOISY, 3.9, 12.0)
    assert not is_spike(NOISY, 1.0, 6.0)


def test_a_short_history_says_nothing():
    assert not is_spike(NOISY[: LEAST - 1], 100.0, 6.0)
    assert is_spike(NOISY[:LEAST], 100.0, 6.0)


def test_a_flat_history_does_not_make_wiggles_spikes():
    assert not is_spike([2.0] * 50, 2.01, 6.0)
    assert is_spike([2.0] * 50, 2.2, 6.0)


def test_only_recent_losses_count():
    assert is_spike([50.0] * 100 + [2.0] * 100, 3.0, 6.0)
