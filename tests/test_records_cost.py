"""What the convergence records, and trackers of them, cost beside the step that makes them."""

import time

import pytest

from qgalore import config
from qgalore.lowrank.subspace import measures, search
from qgalore.training import assemble
from qgalore.training.records import ProgressLine

STEPS, FEW = 16, 6
RECORDING = [(measures, name) for name in ("moments", "captured", "angle_cosines", "lines_before", "int8_change")]


@pytest.mark.slow
def test_records_cost_less_than_a_hundredth_of_a_step(tiny_run, monkeypatch):
    """CPU time of the functions that record, in the quickstart's steps 2 to 17, with its 1.4 refreshes a step. Both are
    measured inside one run and in CPU time, which other programs hardly disturb."""
    spent = []

    def timed(work):
        def call(*args, **options):
            started = time.process_time()
            result = work(*args, **options)
            spent.append(time.process_time() - started)
            return result

        return call

    for module, name in (*RECORDING, (search, "captured_energy")):
        monkeypatch.setattr(module, name, timed(getattr(module, name)))
    run = assemble.build(
        config.load("quickstart", ["data.cache_dir=cache", "run.dir=runs", "train.max_steps=100"]), None
    )
    loop = run.loop
    run.model.train()
    loop._step()  # in which every layer finds its first basis
    spent.clear()
    started = time.process_time()
    for _ in range(STEPS):
        loop._step()
    share = sum(spent) / (time.process_time() - started)
    refreshes = run.loop.optimizer.refresh_counts()[0] - 35
    print(f"{sum(spent):.3f} s in {refreshes} refreshes, {share:.2%} of the time of {STEPS} steps")
    assert refreshes > STEPS
    assert share < 0.01


@pytest.mark.slow
def test_three_trackers_take_less_than_a_hundredth_of_a_step(tiny_run, trackers_offline):
    """The time for which training waits for them, in the same steps. What a package does in threads and processes of
    its own meanwhile is not in it."""
    for package in ("wandb", "trackio"):
        pytest.importorskip(package, reason="an optional package of trackers")
    keys = ["data.cache_dir=cache", "run.dir=runs", "train.max_steps=100", "tracking=[tensorboard, wandb, trackio]"]
    loop = assemble.build(config.load("quickstart", keys), None).loop
    loop.model.train()
    progress, tracking = ProgressLine(100), loop.course.tracking
    waited, real = [], tracking.send

    def send(*rows):
        started = time.perf_counter()
        real(*rows)
        waited.append(time.perf_counter() - started)

    tracking.send = send
    with tracking:
        loop._record(loop._step(), progress)
        waited.clear()
        started = time.perf_counter()
        for _ in range(FEW):
            loop._record(loop._step(), progress)
        share = sum(waited) / (time.perf_counter() - started)
    print(f"{1000 * sum(waited) / FEW:.2f} ms a step, {share:.2%} of the time of {FEW} steps")
    assert len(waited) == FEW
    assert share < 0.01
