"""Streamed blocks in several processes: each has records of its own, and the bits are those of resident blocks."""

import pytest
from helpers import assert_same
from jobs import codes, live, rows, state
from processes import run_in

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


@pytest.mark.slow
def test_a_bug_in_one_process_ends_all_with_sums_and_copies_under_way(folder):
    with pytest.raises(AssertionError, match="KeyError: 'a bug'") as raised:
        run_in(2, live, str(folder), [*SHORT, "memory.stream=all"], (1, 1, "bug going back"))
    assert "rank 1" in str(raised.value)
