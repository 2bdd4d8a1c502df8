"""Layer-major steps in several processes: their number changes nothing but the order of fp32 sums."""

import numpy as np
import pytest
from jobs import (
    LONG,
    MICRO_BATCHES,
    RANK,
    SMALL,
    WIDTH,
    Chain,
    Wire,
    assert_same_steps,
    chain_of,
    steps_of_a_loop,
    take,
    walked_steps,
)
from processes import run_in

from qgalore.memory.traffic import payload
from qgalore.parallel import job
from qgalore.steps.reducing import Steps

SLOW = pytest.mark.slow


def slow(*values):
    return pytest.param(*values, marks=SLOW)


@pytest.mark.parametrize(
    ("size", "how", "steps", "clip", "options"),
    [
        pytest.param(2, "replicate", 7, 0.0, {}, id="replicate"),
        pytest.param(2, "shard", 7, 0.0, {}, id="shard"),
        (4, "replicate", 7, 100.0, {}),
        pytest.param(4, 2, 7, 100.0, {}, id="mesh, clipped"),
        slow(4, "replicate", 30, 0.0, {}),
        slow(3, "shard", 30, 0.0, {}),  # whose rows do not divide
        slow(4, "shard", 30, 100.0, {"inner": "adamw"}),
        slow(4, "replicate", 7, 0.0, {"rule": "muon"}),
        slow(3, "shard", 7, 100.0, {"rule": "muon"}),
        slow(4, 2, 7, 0.0, {"rule": "muon", "momentum": "8bit"}),
        slow(4, "replicate", 7, 0.0, {"rule": "sinkgd"}),
        slow(3, "shard", 7, 0.0, {"rule": "sinkgd"}),
        slow(2, "replicate", 7, 0.0, {"rule": "fira"}),
        slow(4, "shard", 7, 0.0, {"rule": "fira"}),
        slow(2, "shard", 7, 0.0, {"rule": "apollo", "rank": 8}),
        slow(2, "shard", 7, 0.0, {"rule": "scale"}),
    ],
)
def test_where_sums_are_exact_the_number_of_processes_does_not_show(size, how, steps, clip, options):
    """``how``: with a number, that many replicas of a split model."""
    same_in_one_process(size, how, steps, clip, options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "how", "options"),
    [
        (2, "replicate", {}),
        (4, "shard", {}),
        (2, "shard", {"rule": "muon"}),
        (4, "replicate", {"rule": "muon"}),
        (4, 2, {"rule": "muon"}),
    ],
)
def test_nor_where_each_process_has_four_micro_batches(size, how, options):
    same_in_one_process(size, how, 7, 0.0, options, 4 * size)


def same_in_one_process(size, how, steps, clip, options, many=MICRO_BATCHES):
    ((wanted, refreshed),) = run_in(1, walked_steps, how, steps, clip, options, many)  # on one thread, as the others
    for number, block in enumerate(Chain().blocks):
        assert (wanted[f"blocks.{number}.layer.weight"] != block.layer.weight.numpy()).mean() > 0.2
    assert not refreshed or ("blocks.2.layer", 1) in refreshed  # a first basis that has waited
    for found, events in run_in(size, walked_steps, how, steps, clip, options, many):
        assert events == refreshed
        assert_same_steps(found, wanted)


def what_is_sent(how, steps, clip=0.0):
    """Bytes on the wire in each step, and those of the plan; and what each call of the walk's found: how many blocks
    had gradients before it and after it."""
    blocks = []
    call = Steps.__call__

    def counted(self, name, parameters):
        alive = [count(order.layout.blocks, optimizer)]
        call(self, name, parameters)
        blocks.append((name, *alive, count(order.layout.blocks, optimizer)))

    def count(layers, optimizer):
        return sum(any(tensor.holds_gradient() for tensor in optimizer.tensors_of(block)) for block in layers)

    with job("cpu") as team:
        _, optimizer, order = chain_of(
            team, how, {"policy": "fixed", "update_proj_gap": 3, "stagger": False}, clip=clip
        )
        Steps.__call__ = counted
        sent = []
        for step in range(steps):
            with Wire() as wire:
                take(order, step)
            sent.append(dict(wire.bytes))
        return sent, payload(optimizer.tensors, float("inf")), blocks


def in_step(number, of_ranks):
    """What the ranks hand to collectives in a step; what they hand out, added up, as each does so for its own."""
    sent = [found[number] for found, *_ in of_ranks]
    handed = sum(one.pop("handed", 0) for one in sent)
    assert all(one == sent[0] for one in sent)
    return sent[0] | ({"handed": handed} if handed else {})


@pytest.mark.parametrize("how", ["replicate", "shard"])
def test_a_block_is_summed_once_and_gathered_twice_in_a_step(how):
    """Each process has two micro-batches, of which that would not be true if they were sent one by one."""
    of_ranks = run_in(2, what_is_sent, how, 3)
    _, planned, alive = of_ranks[0]
    values, vectors, norms = RANK * (2 * LONG + SMALL), 3 * WIDTH, 0
    if how == "replicate":
        wanted = {"summed": 4 * (values + vectors)}
    else:
        weights = (2 * LONG + SMALL) * WIDTH * (1 + 2 / 32)
        bases, norms = 3 * WIDTH * RANK * (1 / 2 + 2 / 64), 4 * 3
        wanted = {"gathered": 2 * (weights + bases), "reduced": 4 * values, "summed": 4 * vectors + norms}
        wanted |= {"handed": weights}
    assert (
        in_step(2, of_ranks) == wanted
    )  # two layers are due in the first step, one in the second, and two in the fourth
    assert sum(planned.values()) == sum(wanted.values()) - norms
    assert [name for name, *_ in alive[:5]] == ["epilogue", "block 2", "block 1", "block 0", "prologue"]
    for name, before, after in alive[5:]:  # block 2 has none in the first step
        assert after == {"epilogue": 0, "prologue": 0}.get(name, 1), name
        assert before <= 2
    assert max(before for _, before, _ in alive) == 2


def test_a_clipped_step_gathers_once_more_and_hands_new_bases_out_once():
    (plain, clipped) = (run_in(2, what_is_sent, "shard", 1, clip) for clip in (0.0, 0.5))
    wanted, found = in_step(0, plain), in_step(0, clipped)
    assert found["handed"] == wanted["handed"]
    assert found["gathered"] == wanted["gathered"] * 3 / 2


def test_a_loop_of_ones_own_takes_the_same_steps():
    ((wanted, blocks),) = run_in(1, steps_of_a_loop, 3)
    for found, walked in run_in(2, steps_of_a_loop, 3):
        assert walked == blocks == [3] * 3
        for name, value in wanted.items():
            if name in ("losses", "norms"):
                np.testing.assert_allclose(found[name], value, rtol=1e-6)
            else:
                assert np.array_equal(found[name], value), name
