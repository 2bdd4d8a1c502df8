"""Streamed blocks in several processes: each has records of its own, and the bits are those of resident blocks."""

import pytest
from helpers import assert_same
from jobs import chain_of, codes, live, rows, state, take
from processes import run_in

from qgalore.parallel import job
from qgalore.steps.turns import AlwaysThere

STEPS = 4
SHORT = [f"train.max_steps={STEPS}", "train.grad_accumulation=4", "train.eval_every=2", "train.eval_batches=5"]
SHORT += [
    "train.save_every=2",
    "lowrank.update_proj_gap=2",
    "model.overrides.num_hidden_layers=4",
    "train.order=layer_major",
]


@pytest.mark.parametrize(
    "options",
    [
        ["memory.stream=all"],
        pytest.param(["memory.stream=weights", "train.clip_grad_norm=0.5", "memory.slots=3"], marks=pytest.mark.slow),
        pytest.param(["memory.stream=all", "lowrank.rule=muon"], marks=pytest.mark.slow),
        pytest.param(["memory.stream=all", "model.config=mixtral_quickstart"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_streamed_processes_take_the_steps_of_resident_ones(folder, options):
    """With refreshes, whose bases one process finds for both. A mixture's experts may have tokens in one alone."""
    for name, stream in (("resident", ["memory.stream=none"]), ("streamed", [])):
        found = run_in(2, live, str(folder), [*SHORT, *options, *stream, f"run.name={name}"])
        assert codes(found) == {0}, found
    assert_same(state(folder / "runs/streamed", STEPS), state(folder / "runs/resident", STEPS))
    for key in ("lr", "eval_loss"):
        pairs = zip(*(rows(folder / f"runs/{name}", key) for name in ("streamed", "resident")), strict=True)
        for one, other in pairs:
            assert (one.get("loss"), one.get("eval_loss")) == (other.get("loss"), other.get("eval_loss"))


class Leaving(AlwaysThere):
    """Notes which tensors of a block still hold the gradient of a step when it leaves."""

    def __init__(self, order, stays):
        self.order, self.stays, self.late = order, stays, []

    def leave(self, block, stepped):
        own = self.order.optimizer.tensors_of(self.order.layout.blocks[block]) if stepped else []
        self.late += [tensor.name for tensor in own if tensor.holds_gradient()]


def late(stays):
    with job("cpu") as team:
        *_, order = chain_of(team, "replicate", {"policy": "fixed"})
        order.turns = Leaving(order, stays)
        for step in range(2):
            take(order, step)
        return len(order.turns.late)


def test_a_block_that_does_not_stay_has_stepped_when_it_leaves():
    """On a CPU a later step could go unseen, as its slot and its record are both host memory. Other blocks step late,
    while the next one works."""
    assert run_in(2, late, False) == [0, 0]
    assert min(run_in(2, late, True)) > 0


@pytest.mark.slow
def test_a_bug_in_one_process_ends_all_with_sums_and_copies_under_way(folder):
    with pytest.raises(AssertionError, match="KeyError: 'a bug'") as raised:
        run_in(2, live, str(folder), [*SHORT, "memory.stream=all"], (1, 1, "bug going back"))
    assert "rank 1" in str(raised.value)
