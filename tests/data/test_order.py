import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qgalore.data.order import SampleOrder
from qgalore.errors import ConfigError

sizes = st.integers(1, 40)
seeds = st.integers(0, 2**64 - 1)


@settings(max_examples=60, deadline=None)
@given(sizes, seeds, st.lists(st.integers(0, 70), max_size=8))
def test_takes_concatenate_and_resume(n, seed, counts):
    whole, end = SampleOrder(n, seed).take((0, 0), sum(counts))
    assert len(whole) == sum(counts)
    position, pieces = (0, 0), []
    for count in counts:
        # A new object each time: nothing but seed and position may matter.
        piece, position = SampleOrder(n, seed).take(position, count)
        pieces += piece
    assert pieces == whole
    assert position == end == (sum(counts) // n, sum(counts) % n)


@settings(max_examples=40, deadline=None)
@given(sizes, seeds)
def test_every_epoch_holds_every_sample_once(n, seed):
    order = SampleOrder(n, seed)
    taken, _ = order.take((0, 0), 3 * n)
    assert all(sorted(taken[epoch * n : (epoch + 1) * n]) == list(range(n)) for epoch in range(3))
    # Asking for an earlier epoch again gives it again, whatever is cached.
    assert order.take((0, 0), 3 * n)[0] == taken


def test_epochs_and_seeds_differ():
    n = 50
    orders = {
        (seed, epoch): tuple(SampleOrder(n, seed).take((epoch, 0), n)[0]) for seed in range(3) for epoch in range(3)
    }
    assert len(set(orders.values())) == len(orders)
    assert tuple(range(n)) not in orders.values()


def test_plain_integers():
    taken, position = SampleOrder(5, 0).take((0, 3), 4)
    assert {type(value) for value in (*taken, *position)} == {int}


@pytest.mark.parametrize("position", [(0, 5), (0, -1), (-1, 0)])
def test_position_of_other_data(position):
    with pytest.raises(ConfigError, match="resume with the data"):
        SampleOrder(5, 0).take(position, 1)
