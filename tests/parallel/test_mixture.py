"""Mixtures of experts in several processes: tokens differ from process to process, steps do not."""

import numpy as np
import pytest
import torch
from jobs import whole
from processes import run_in
from torch import nn

import qgalore
from qgalore.lowrank.layers.experts import Experts
from qgalore.lowrank.layers.linear import LowRankLinear
from qgalore.parallel import job

MICRO_BATCHES, TOKENS, WIDE, RANK, EXPERTS = 4, 64, 512, 8, 4  # Δ has 4,096 values: moments of 8 bits
RARE, LATE, NEVER = 1, 2, 3  # an expert of one micro-batch alone, one of the later steps, one without any token
FIRST_TOKENS = 4  # the step of LATE's


class _Axes(torch.autograd.Function):
    """Hands ``values`` on instead of the rows, and ``gradient`` back: both sides' gradients are then integers."""

    @staticmethod
    def forward(ctx, rows, values, gradient):
        ctx.save_for_backward(gradient)
        return values.clone()

    @staticmethod
    def backward(ctx, _):
        return ctx.saved_tensors[0], None, None


class Gating(nn.Module):
    """In the place of transformers' gate: a diagonal of the micro-batch's integers."""

    def _apply_gate(self, rows):
        return _Axes.apply(rows, self.values, torch.eye(TOKENS, 2 * WIDE))


class Mixture(nn.Module):
    """Experts whose gradients are diagonals of integers that are all different (see test_replicate), and a dense
    layer before them."""

    def __init__(self, proj_type="std"):
        super().__init__()
        make = torch.Generator().manual_seed(3)

        def layers(out, width):
            weights = (torch.randn(out, width, generator=make) for _ in range(EXPERTS))
            return [LowRankLinear(weight, None, rank=RANK, group_size=32, proj_type=proj_type) for weight in weights]

        self.experts = Experts(Gating(), layers(2 * WIDE, TOKENS), layers(TOKENS, WIDE))
        self.dense = nn.Parameter(torch.zeros(TOKENS))

    def loss(self, step, number):
        """Every token of micro-batch ``number`` goes to expert 0 and, by the number, to RARE, LATE or no other."""
        make = torch.Generator().manual_seed(step)
        order = torch.randperm(TOKENS, generator=make)
        wobble = torch.randint(0, 2, (MICRO_BATCHES, TOKENS), generator=make)[number]
        values = torch.diag((2 * (order + 1) + wobble).float())
        self.experts.gating.values = torch.eye(TOKENS, WIDE) * values.diagonal()[:, None]
        second = RARE if number == (step + 3) % MICRO_BATCHES else LATE if step >= FIRST_TOKENS and number % 2 else 0
        chosen = torch.tensor([0, second] if second else [0]).expand(TOKENS, -1)
        found = self.experts(values + self.dense, chosen, torch.ones(chosen.shape))
        return (found * torch.eye(TOKENS)).sum() + (self.dense * wobble).sum()


def exact_steps(way, steps):
    """State, and what was said of experts, after ``steps`` that share MICRO_BATCHES among the processes."""
    with job("cpu") as team:
        model = Mixture()
        stepping = "fused" if way == "fused" else "deferred"
        options = {"update_proj_gap": 3, "seed": 1, "weight_decay": 0.1, "inner": "adamw8bit"}
        optimizer = qgalore.optimizer(model, lr=0.02, stepping=stepping, team=team, **options)
        said = []
        for step in range(steps):
            for number in team.deal(range(MICRO_BATCHES)):
                model.loss(step, number).backward()
            optimizer.step()
            said.append((sorted(optimizer.untouched), optimizer.waiting(), optimizer.refresh_counts()))
        said.append(sorted((e["layer"], e["step"], e.get("waited")) for e in optimizer.events))
        state = {**model.state_dict(), "norm": torch.tensor(optimizer.grad_norm)}
        for slot, parts in optimizer.state_dict()["slots"].items():
            state |= {f"{slot}|{name}": value for name, value in parts["inner"].items()}
        return whole(team, state), said


@pytest.mark.parametrize(
    ("size", "way", "steps"),
    [
        (2, "deferred", 9),
        (4, "fused", 9),
        pytest.param(4, "deferred", 30, marks=pytest.mark.slow),
        pytest.param(4, "fused", 30, marks=pytest.mark.slow),
    ],
)
def test_where_sums_are_exact_experts_are_identical(size, way, steps):
    ((wanted, said),) = run_in(1, exact_steps, "deferred", steps)
    before = Mixture().experts
    for kind in ("gate_up_proj", "down_proj"):
        moved = [
            (wanted[f"experts.{kind}.{e}.weight"] != getattr(before, kind)[e].weight.numpy()).any()
            for e in range(EXPERTS)
        ]
        assert moved == [True, True, True, False]  # NEVER is not even decayed
    assert any(words[1] for words in said[:-1])
    assert {row[2] for row in said[-1]} >= {FIRST_TOKENS}  # a first basis that waited
    for found, words in run_in(size, exact_steps, way, steps):
        assert words == said
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            exact = way == "deferred" or name != "norm"  # the others add its squares up in another order
            assert np.array_equal(found[name], value) if exact else abs(found[name] / value - 1) < 1e-6, name
