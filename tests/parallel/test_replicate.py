"""Replicated training: the number of processes changes nothing but the order of fp32 sums."""

import numpy as np
import pytest
import torch
from jobs import plain
from processes import run_in
from torch import nn

import qgalore
from qgalore.lowrank.layers.linear import LowRankLinear
from qgalore.memory.traffic import payload
from qgalore.parallel import job

MICRO_BATCHES, WIDTH, LONG, RANK = 4, 64, 512, 8  # Δ has 4,096 values, from where on moments have 8 bits
ORDER = (
    "all-reduce Δ gradients",
    "all-reduce dense gradients",
    "all-reduce full gradients of refreshes",
    "broadcast bases",
)


class Layers(nn.Module):
    """A layer with its basis on the right, one with it on the left, and a dense bias."""

    def __init__(self):
        super().__init__()
        make = torch.Generator().manual_seed(3)
        options = {"rank": RANK, "group_size": 32}
        self.right = LowRankLinear(torch.randn(LONG, WIDTH, generator=make), torch.zeros(LONG), **options)
        self.left = LowRankLinear(torch.randn(WIDTH, LONG, generator=make), None, **options)

    def loss(self, step, number):
        """A loss whose gradients are integers: micro-batch ``number`` adds to the diagonals of both weights' gradients,
        whose entries are all different, so that every basis is a choice of axes, different in each step."""
        make = torch.Generator().manual_seed(step)
        order = torch.randperm(WIDTH, generator=make)
        wobble = torch.randint(0, 2, (MICRO_BATCHES, WIDTH), generator=make)[number]
        values, eye = (2 * (order + 1) + wobble).float(), torch.eye(LONG)[:WIDTH]
        right = self.right(torch.diag(values)) * eye
        return right.sum() + (self.left(eye * values[:, None]) * torch.eye(WIDTH)).sum()


def exact_steps(stepping, steps):
    with job("cpu") as team:
        model = Layers()
        options = {"update_proj_gap": 5, "moments": "rotate", "seed": 1, "weight_decay": 0.1}
        optimizer = qgalore.optimizer(model, lr=0.02, stepping=stepping, team=team, **options)
        for step in range(steps):
            for number in team.deal(range(MICRO_BATCHES)):
                model.loss(step, number).backward()
            optimizer.step()
        state = {**model.state_dict(), "norm": torch.tensor(optimizer.grad_norm)}
        for slot, parts in optimizer.state_dict()["slots"].items():
            state |= {f"{slot}|{name}": value for name, value in parts["inner"].items()}
        return {name: value.numpy() if torch.is_tensor(value) else value for name, value in plain(state).items()}


SLOW = pytest.mark.slow


@pytest.mark.parametrize(("size", "steps"), [(2, 12), pytest.param(2, 50, marks=SLOW), pytest.param(4, 50, marks=SLOW)])
def test_where_sums_are_exact_weights_are_identical(size, steps):
    (wanted,) = run_in(1, exact_steps, "deferred", steps)  # on one thread, as the others
    assert (wanted["right.weight"] != Layers().right.weight.numpy()).mean() > 0.5
    assert wanted["right|state1"].dtype == np.uint8
    modes = ["deferred", "fused"] if size == MICRO_BATCHES else ["deferred"]
    for mode in modes:
        for found in run_in(size, exact_steps, mode, steps):
            assert found.keys() == wanted.keys()
            for name, value in wanted.items():
                assert np.array_equal(found[name], value), (mode, name)


def count_bytes(steps):
    """Bytes of the tensors reduced and broadcast in each step, as the communication library is handed them."""
    sizes = {}
    reduce, broadcast = torch.distributed.all_reduce, torch.distributed.broadcast

    def counting(call):
        def counted(tensor, *arguments, **options):
            sizes[-1] += tensor.nbytes if tensor.is_floating_point() else 0  # flags and words are no payload
            return call(tensor, *arguments, **options)

        return counted

    torch.distributed.all_reduce, torch.distributed.broadcast = counting(reduce), counting(broadcast)
    with job("cpu") as team:
        model = Layers()
        optimizer = qgalore.optimizer(model, lr=0.02, stepping="fused", team=team, policy="fixed", update_proj_gap=3)
        found = []
        for step in range(steps):
            sizes[-1] = 0
            model.loss(step, team.rank).backward()
            optimizer.step()
            found.append(sizes[-1])
        return found, payload(optimizer.tensors, 1), payload(optimizer.tensors, float("inf"))


def test_bytes_sent_are_those_planned_and_a_share_of_full_gradients():
    (found, refreshing, ordinary), _ = run_in(2, count_bytes, 9)
    delta, dense, full, bases = (refreshing[name] for name in sorted(refreshing, key=ORDER.index))
    assert delta == 4 * RANK * LONG * 2  # Δ of both layers, fp32
    assert found[0] == delta + dense + bases  # the first bases cost no full gradient
    assert min(found) == sum(ordinary.values()) == delta + dense
    # two layers, each every third step, where the full gradient stands for Δ's
    assert sum(found[1:]) == pytest.approx(8 * (delta + dense) + 8 / 3 * (full + bases - delta), rel=0.15)
    # what DistributedDataParallel would send of the two weights in fp32, times r / min(out, in)
    assert delta <= 1.1 * (2 * LONG * WIDTH * 4) * RANK / WIDTH
