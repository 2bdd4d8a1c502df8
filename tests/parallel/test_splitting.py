"""Weights split by rows over processes: the number of processes changes nothing but the order of fp32 sums."""

import numpy as np
import pytest
import torch
from jobs import LONG, MICRO_BATCHES, RANK, SMALL, WIDTH, Layers, Wire, whole
from processes import run_in
from qgalore.lowrank.tensors.sharded import share_rows, shareable

import qgalore
from qgalore.errors import ConfigError
from qgalore.lowrank.layers.linear import LowRankLinear
from qgalore.memory.traffic import payload
from qgalore.parallel import job


def model_and_optimizer(team):
    model = Layers()
    if team.size > 1:
        share_rows(model.blocks, torch.device("cpu"))
    options = {"update_proj_gap": 5, "moments": "rotate", "seed": 1, "weight_decay": 0.1, "team": team}
    return model, qgalore.optimizer(model, lr=0.02, **options)


def exact_steps(steps):
    with job("cpu") as team:
        model, optimizer = model_and_optimizer(team)
        for step in range(steps):
            for number in team.deal(range(MICRO_BATCHES)):
                model.loss(step, number).backward()
            optimizer.step()
        state = dict(model.state_dict())
        for slot, parts in optimizer.state_dict()["slots"].items():
            state |= {f"{slot}|{name}": value for name, value in parts["inner"].items()}
        return whole(team, state), optimizer.grad_norm


SLOW = pytest.mark.slow


@pytest.mark.parametrize(("size", "steps"), [(2, 12), pytest.param(2, 50, marks=SLOW), pytest.param(4, 50, marks=SLOW)])
def test_where_sums_are_exact_weights_are_identical(size, steps):
    ((wanted, norm),) = run_in(1, exact_steps, steps)  # on one thread too, or decompositions differ
    assert (wanted["blocks.0.0.weight"] != Layers().blocks[0][0].weight.numpy()).mean() > 0.5
    assert [wanted[f"blocks.{n}.0|state1"].dtype for n in (0, 1)] == [np.uint8, np.float32]
    for found, its_norm in run_in(size, exact_steps, steps):
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert np.array_equal(found[name], value), name
        assert its_norm == pytest.approx(norm, rel=1e-6)


def count_bytes(steps):
    """What is gathered and what is reduced and scattered in each step, and the plan of it."""
    with job("cpu") as team:
        model, optimizer = model_and_optimizer(team)
        found = []
        for step in range(steps):
            with Wire() as wire:
                for number in team.deal(range(MICRO_BATCHES)):
                    model.loss(step, number).backward()
                optimizer.step()
            found.append({name: size for name, size in wire.bytes.items() if name != "summed"})
        return found, payload(optimizer.tensors, float("inf"), MICRO_BATCHES // team.size)


def test_bytes_sent_are_those_planned():
    (found, planned), _ = run_in(2, count_bytes, 3)
    cells = (LONG + SMALL) * WIDTH
    assert planned["gather weights"] == 2 * 2 * cells * (1 + 2 / 32)  # twice for each micro-batch; a scale for 32
    assert planned["reduce-scatter Δ gradients"] == 2 * 4 * (LONG + SMALL) * RANK
    for step in (0, 1):  # in the first from full gradients; both layers are due again after the second
        assert found[step] == {"gathered": planned["gather weights"], "reduced": planned["reduce-scatter Δ gradients"]}


@pytest.mark.parametrize(
    ("rows", "inner", "remedy"),
    [
        (96, "adamw", "multiple of 5"),
        (200, "adamw4bit", "use one of adamw8bit, adamw"),
        (1000, "adamw8bit", "at least 4,096"),
        (2570, "adamw8bit", "whole blocks of 256"),
        (5120, "adamw8bit", "step in parts"),
    ],
)
def test_layers_that_cannot_be_split(rows, inner, remedy):
    layer = LowRankLinear(torch.zeros(rows, WIDTH), None, rank=RANK, proj_type="right")
    with pytest.raises(ConfigError, match=remedy):
        shareable("it", layer, inner, 5, 40_000)
    shareable("it", layer, "adamw", 1)
    with pytest.raises(ConfigError, match="proj_type: right"):
        shareable("it", LowRankLinear(torch.zeros(40, WIDTH), None, rank=RANK), inner, 5, 40_000)
