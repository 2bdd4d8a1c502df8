import pytest

from qgalore.lowrank.subspace.schedule import LazySchedule, staggered_first_gaps


def run(schedule, steps, similarity):
    """The steps in which a schedule refreshed, with ``similarity(step)`` reported from the second on."""
    refreshed = []
    for step in range(steps):
        if schedule.due(step):
            schedule.record(step, similarity(step) if refreshed else None)
            refreshed.append(step)
    return refreshed


def test_low_similarity_keeps_the_published_gap():
    assert run(LazySchedule(10, 10), 45, lambda _: 0.1) == [0, 10, 20, 30, 40]


def test_gap_grows_when_the_mean_of_a_full_queue_reaches_the_threshold():
    schedule = LazySchedule(10, 10, queue_size=2, cos_threshold=0.4, gamma_proj=2.0)
    # similarities arrive at 10, 20 (queue full: gap 20), 40 (gap 40), 80
    assert run(schedule, 100, lambda _: 0.5) == [0, 10, 20, 40, 80]
    assert schedule.gap == 80


def test_the_mean_decides_not_the_last_value():
    schedule = LazySchedule(10, 10, queue_size=2)
    assert run(schedule, 50, lambda step: 0.9 if step == 20 else 0.0)[:4] == [0, 10, 20, 40]
    schedule = LazySchedule(10, 10, queue_size=2)
    assert run(schedule, 50, lambda step: 0.7 if step == 20 else 0.0) == [0, 10, 20, 30, 40]


def test_max_gap_bounds_growth():
    schedule = LazySchedule(10, 10, queue_size=1, max_gap=25)
    run(schedule, 200, lambda _: 1.0)
    assert schedule.gap == 25


def test_fractional_factors_never_stall_below_one_step():
    schedule = LazySchedule(1, 1, queue_size=1, gamma_proj=1.5)
    assert run(schedule, 4, lambda _: 1.0) == [0, 1, 2, 3]


def test_failure_keeps_the_gap_and_is_counted():
    schedule = LazySchedule(10, 10)
    schedule.record(0, None)
    schedule.record_failure(10)
    assert (schedule.next_refresh, schedule.refreshes, schedule.failures) == (20, 1, 1)


@pytest.mark.parametrize(("layers", "gap"), [(7, 200), (224, 500), (10, 3), (1, 5)])
def test_stagger_spreads_refreshes_over_the_gap(layers, gap):
    first = staggered_first_gaps(layers, gap)
    assert len(first) == layers
    assert min(first) >= 1
    assert max(first) == gap
    busiest = max(first.count(step) for step in set(first))
    assert busiest <= -(-layers // gap) + 1


@pytest.mark.parametrize(("first_gap", "steps"), [(10, 0), (10, 1), (10, 10), (10, 11), (3, 4), (3, 24), (10, 101)])
def test_fixed_refreshes_is_what_a_schedule_without_laziness_does(first_gap, steps):
    schedule = LazySchedule(10, first_gap, cos_threshold=2.0)
    done = len(run(schedule, steps, lambda _: 1.0))
    assert LazySchedule(10, first_gap).fixed_refreshes(steps) == done


def test_state_round_trip():
    schedule = LazySchedule(10, 4, queue_size=2)
    run(schedule, 37, lambda step: step / 40)
    assert LazySchedule(**schedule.state()) == schedule
