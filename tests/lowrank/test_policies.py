"""When a subspace is looked for again, policy by policy: on schedules alone, on a model, after a checkpoint."""

import copy
import json
from itertools import pairwise

import pytest
import torch
from helpers import QUICK, assert_same, loss_of, save_checkpoint, stored, train

from qgalore import config
from qgalore.files import checkpoint
from qgalore.lowrank.factory import optimizer
from qgalore.lowrank.subspace import search
from qgalore.lowrank.subspace.policies import POLICIES, layers_at_once, make_schedules
from qgalore.lowrank.subspace.schedule import EnergySchedule
from qgalore.models.convert import convert
from qgalore.schedule_defaults import THRESHOLDS

LAZY = {"cos_threshold": 0.4, "gamma_proj": 2.0, "queue_size": 1, "max_gap": 1000}


def simulate(schedule, steps, energy, similarity=1.0):
    """(steps with a refresh, steps with a look) of a schedule told ``energy(step, last refresh)``."""
    refreshed, looked = [], []
    for step in range(steps):
        if not schedule.due(step):
            continue
        looked.append(step)
        if schedule.wants(step, lambda step=step: energy(step, refreshed[-1])):
            schedule.record(step, similarity if refreshed else None)
            refreshed.append(step)
    return refreshed, looked


def test_a_basis_that_still_captures_as_much_is_kept():
    """Looks four times in a gap, and one decomposition in all, until max_gap asks for another."""
    refreshed, looked = simulate(EnergySchedule(8, 2), 40, lambda step, last: 0.8)
    assert (refreshed, looked) == ([0], list(range(0, 40, 2)))
    refreshed, _ = simulate(EnergySchedule(8, 2, max_gap=16), 40, lambda step, last: 0.8)
    assert refreshed == [0, 16, 32]


def test_a_fall_below_nine_tenths_of_the_reference_refreshes():
    """Looks at 2 and 4 are the reference, 0.8; at 10 the energy drops to 0.5 and the average, ½·0.8 + ½·0.5 = 0.65, is
    under 0.72. A drop to 0.7 leaves it at 0.75 there; the next, 0.725, is not under it either, 0.7125 at step 14 is."""
    assert simulate(EnergySchedule(8, 2), 12, lambda step, last: 0.5 if step >= 10 else 0.8)[0] == [0, 10]
    assert simulate(EnergySchedule(8, 2), 16, lambda step, last: 0.7 if step >= 10 else 0.8)[0] == [0, 14]


def test_one_outlier_or_a_low_level_does_not_refresh():
    """What counts is the fall against the basis' own reference, on average: not the level, and not one noisy look."""
    assert simulate(EnergySchedule(8, 2), 60, lambda step, last: 0.05)[0] == [0]
    assert simulate(EnergySchedule(8, 2), 60, lambda step, last: 0.65 if step == 20 else 0.8)[0] == [0]


def test_every_basis_has_its_own_reference():
    """A drift that costs each basis a tenth in 10 steps: refreshes follow one another, at like distances."""
    refreshed, _ = simulate(EnergySchedule(8, 2), 100, lambda step, last: 0.9 ** ((step - last) / 10))
    gaps = {b - a for a, b in pairwise(refreshed)}
    assert len(gaps) == 1
    assert 10 <= gaps.pop() <= 25


def test_a_failed_decomposition_is_tried_again_at_the_next_look():
    schedule = EnergySchedule(8, 2)
    simulate(schedule, 10, lambda step, last: 0.8)
    assert schedule.wants(10, lambda: 0.1)
    schedule.record_failure(10)
    assert (schedule.due(11), schedule.due(12)) == (False, True)
    assert schedule.wants(12, lambda: 0.1)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_schedule_in_the_middle_survives_json(policy):
    """Resumed = uninterrupted, for every value that a schedule keeps."""

    def energy(step, last):
        return 0.9 - 0.013 * (step - last)

    (whole,) = make_schedules(policy, 1, 8, True, LAZY)
    expected = simulate(whole, 120, energy, 0.5)
    (cut,) = make_schedules(policy, 1, 8, True, LAZY)
    first = simulate(cut, 53, energy, 0.5)
    cut = type(cut)(**json.loads(json.dumps(cut.state())))
    refreshed = list(first[0])
    for step in range(53, 120):
        if cut.due(step) and cut.wants(step, lambda step=step: energy(step, refreshed[-1])):
            cut.record(step, 0.5)
            refreshed.append(step)
    assert refreshed == expected[0]
    assert max(first[0]) < 53 < max(refreshed)


def test_fixed_gaps_never_stretch_and_lazy_ones_do():
    (fixed,) = make_schedules("fixed", 1, 8, True, LAZY)
    assert simulate(fixed, 40, None)[0] == [0, 8, 16, 24, 32]
    (lazy,) = make_schedules("overlap", 1, 8, True, LAZY)
    assert simulate(lazy, 40, None)[0] == [0, 8, 24]


def test_looks_are_spread_over_the_layers():
    schedules = make_schedules("energy", 5, 16, True, LAZY)  # looks four steps apart
    for schedule in schedules:
        schedule.record(0, None)
    due = [sum(schedule.next_refresh == step for schedule in schedules) for step in range(1, 5)]
    assert sum(due) == 5
    assert max(due) == layers_at_once("energy", 5, 16) == 2
    assert layers_at_once("overlap", 5, 16) == 1


def built(tiny_llama, device, policy, **more):
    model = tiny_llama(device)
    convert(model, **QUICK)
    lazy = {"update_proj_gap": 4, "queue_size": 1, "cos_threshold": 0.2}
    return model, optimizer(model, lr=0.01, inner="adamw", policy=policy, **{**lazy, **more})


@pytest.mark.parametrize("policy", POLICIES)
def test_a_run_goes_on_after_a_checkpoint(tiny_llama, token_batches, device, policy, tmp_path):
    """Bit for bit, schedules included; fused stepping and deferred look alike on the way."""
    batches = token_batches(device, 12)
    model, opt = built(tiny_llama, device, policy)
    train(model, opt, batches[:7])
    saved = save_checkpoint(tmp_path / "step-00000007", model, opt.state_dict(), {})
    twin, other = built(tiny_llama, device, policy)
    checkpoint.load_into(saved, checkpoint.read_state(saved), twin, other)
    fused, third = built(tiny_llama, device, policy, stepping="fused")
    train(fused, third, batches)
    for one, its in ((model, opt), (twin, other)):
        train(one, its, batches[7:])
        assert_same(stored(one), stored(fused))
    states = [[slot.schedule.state() for slot in o.tensors if hasattr(slot, "schedule")] for o in (opt, other, third)]
    assert states[0] == states[1] == states[2]


def test_what_decides_is_what_is_recorded(tiny_llama, token_batches, device):
    for policy, figure in (
        ("overlap", "overlap_above_chance"),
        ("first_vector", "first_vector"),
        ("signed_cosine", "signed_cosine"),
    ):
        model, opt = built(tiny_llama, device, policy)
        train(model, opt, token_batches(device, 9))
        rows = [row for row in opt.events if not row["first"]]
        assert rows
        assert all(row["similarity"] == row[figure] for row in rows)
        assert all(row["first_vector"] == abs(row["signed_cosine"]) for row in rows)


@pytest.mark.parametrize("projector", ["exact", "randomized"])
@pytest.mark.parametrize("basis_format", ["fp32", "int4"])
@pytest.mark.parametrize("shape", [(64, 48), (48, 64)], ids=["right", "left"])
def test_the_signed_cosine_has_the_sign_of_the_vectors_as_found(shape, basis_format, projector):
    """A gradient that hardly changes, then its first direction mirrored: +1 in every refresh. A basis that is read back
    and made orthonormal has columns of either sign, so that −1 would be recorded."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 4, generator=generator)).Q for n in shape)
    for sign in (1.0, -1.0):
        g = u @ torch.diag(torch.tensor([10.0, 3.0, 2.0, 1.0])) @ (sign * v).T
        model = torch.nn.Sequential(torch.nn.Linear(shape[1], shape[0], bias=False))
        convert(model, rank=4, weight_format="none", basis_format=basis_format)
        how = {"policy": "signed_cosine", "projector": projector, "update_proj_gap": 1, "stagger": False}
        opt = optimizer(model, lr=1e-4, inner="adamw", **how)
        for _ in range(6):
            noisy = g + 1e-3 * torch.randn(shape, generator=generator)
            (model(torch.eye(shape[1])).T * noisy).sum().backward()
            opt.step()
        cosines = [row["signed_cosine"] for row in opt.events if not row["first"]]
        assert len(cosines) == 5
        assert min(cosines) > 0.98


def test_a_look_steps_as_an_ordinary_step_does(tiny_llama, token_batches, device):
    """In a look the projected gradient comes from G instead of Δ's own path: the same product, bracketed differently,
    so equal to fp32 rounding (2⁻²⁴ of each of at most a few hundred terms)."""
    model, opt = built(tiny_llama, device, "energy", stagger=False, stepping="deferred")
    batches = token_batches(device, 2)
    train(model, opt, batches[:1])
    twin = copy.deepcopy(model)
    slot = opt.tensors[0]
    slot.schedule.next_refresh = 1
    slot.arm(1)
    assert slot.module.probe.requires_grad
    loss_of(model, batches[1]).backward()
    full = slot.module.probe.grad.clone()
    left, right = slot.module.columns()
    assert opt.refresh() is None
    looked = slot.gradient().clone()
    module = twin.get_submodule(slot.name)
    module.probe.requires_grad_(False)
    module.delta.requires_grad_(True)
    loss_of(twin, batches[1]).backward()
    assert torch.allclose(looked, module.delta.grad, rtol=1e-4, atol=1e-5 * float(full.abs().max()))
    seen = slot.schedule.first_looks
    side, matrix = (right, full) if right is not None else (left, full.T)
    assert seen == [pytest.approx(search.captured_energy(matrix, side), rel=1e-5)]


def test_a_key_that_the_policy_does_not_read_is_named():
    assert any(
        "lowrank.queue_size has no effect with policy: energy" in line
        for line in config.remarks(config.load("quickstart.yaml", ["lowrank.policy=energy"]))
    )


def test_each_policy_has_a_threshold_of_its_own(tiny_llama):
    assert THRESHOLDS == {"overlap": 0.2, "first_vector": 0.4, "signed_cosine": 0.4}
    for policy in POLICIES:
        for given, wanted in (([], THRESHOLDS.get(policy)), (["lowrank.cos_threshold=0.7"], 0.7)):
            loaded = config.load("quickstart.yaml", [f"lowrank.policy={policy}", *given])
            assert config.resolve(loaded, "cpu", False).lowrank.cos_threshold == wanted
    schedules = {
        name: next(
            s.schedule for s in built(tiny_llama, "cpu", name, cos_threshold=None)[1].tensors if hasattr(s, "schedule")
        )
        for name in POLICIES
    }
    assert {name: schedules[name].cos_threshold for name in THRESHOLDS} == THRESHOLDS
    assert schedules["fixed"].cos_threshold > 1
