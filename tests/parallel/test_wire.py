"""The plan of a job: memory of each process, and what it sends."""

import re

import pytest

from qgalore import config
from qgalore.errors import ConfigError
from qgalore.memory import traffic
from qgalore.training import assemble

SMALL = ("model.overrides.vocab_size=512", "lowrank.rank=32", "train.grad_accumulation=4", "device=cpu")


def planned(capsys, processes):
    assemble.plan(config.load("quickstart.yaml", [*SMALL]), processes)
    return capsys.readouterr().out


def test_the_plan_names_every_collective(capsys):
    alone, four = planned(capsys, 1), planned(capsys, 4)
    assert "wire:" not in alone
    assert "layer-major" in four
    assert "layer-major" in alone
    sizes = re.findall(r"([\d.]+) ([KM])iB", four[four.index("wire:") :])
    total, *parts = (float(size) * (1024 if unit == "M" else 1) for size, unit in sizes)
    assert len(re.findall(r"all-reduce|broadcast", four)) == len(parts) == 4
    assert total == pytest.approx(sum(parts), abs=0.05 * 1024)  # printed to a tenth of a MiB


def test_processes_that_cannot_share_a_step_are_refused(capsys):
    with pytest.raises(ConfigError, match="4, the micro-batches of a step, which 3 processes cannot share"):
        planned(capsys, 3)


def test_a_ring_sends_each_part_once_for_a_broadcast_and_twice_for_a_sum():
    assert traffic.ring(8.0, 4, "all-reduce of anything") == 2 * 8 * 3 / 4
    assert traffic.ring(8.0, 4, "broadcast bases") == 8 * 3 / 4
    assert traffic.ring(8.0, 1, "all-reduce of anything") == 0


def test_the_plan_of_weights_that_are_split(capsys):
    shard = (*SMALL, "parallel=shard")
    assemble.plan(config.load("quickstart.yaml", [*shard]), 4)
    shown = capsys.readouterr().out
    assert all(part in shown for part in ("gather blocks", "reduce Δ gradients", "hand out rows", "gathered blocks"))
    assert "all-reduce Δ" not in shown
