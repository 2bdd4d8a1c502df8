"""A process that fails within a step, where nobody waits for it: all hear of it, by name, and nobody hangs."""

import pytest
import torch
from jobs import MICRO_BATCHES, Chain, chain_of, take
from processes import run_in

import qgalore
from qgalore.errors import ConfigError, NumericalError, RankError
from qgalore.lowrank import tensor_steps
from qgalore.lowrank.optimizer import LowRankOptimizer
from qgalore.lowrank.tensors.projected import ProjectedTensor
from qgalore.parallel import Team, job
from qgalore.replacing import replaced
from qgalore.steps import reducing
from qgalore.steps.blocks import NotWalkableError
from qgalore.steps.walk import _Pass

FIXED = {"policy": "fixed", "update_proj_gap": 100, "stagger": False}


def failing_on(own, number=None, do=None):
    """``own``, but at its call for block ``number``, or in every call, it fails, or does something else afterwards."""

    def work(self, *arguments):
        if number is not None and arguments[0] != number:
            return own(self, *arguments)
        if do is None:
            raise KeyError("a bug")
        own(self, *arguments)
        return do(self, *arguments)

    return work


def spoil(going, block):
    for parameter in going.layout.blocks[block].parameters():
        if parameter.grad is not None:
            parameter.grad.fill_(torch.nan)


def apply_but_one(self, tensors):
    if tensors[0].name == "blocks.1.layer":
        raise KeyError("a bug")
    return own_apply(self, tensors)


def look_but_one(tensors, add):
    if any(tensor.name == "blocks.1.layer" for tensor in tensors):
        raise KeyError("a bug")
    return own_squares(tensors, add)


own_apply, own_squares = LowRankOptimizer._apply, tensor_steps.squares
# the step in which it happens (bases are found in the first), and what is broken
FAULTS = {
    "forward": (2, (_Pass, "_forward_all", failing_on(_Pass._forward_all, 1))),
    "prologue": (2, (_Pass, "_prologues", failing_on(_Pass._prologues))),
    "epilogue": (2, (_Pass, "epilogue", failing_on(_Pass.epilogue, 0))),
    "highest block": (2, (_Pass, "backward", failing_on(_Pass.backward, 2))),
    "block": (2, (_Pass, "backward", failing_on(_Pass.backward, 1))),
    "lowest block": (2, (_Pass, "backward", failing_on(_Pass.backward, 0))),
    "back to the start": (2, (_Pass, "backward_of_prologue", failing_on(_Pass.backward_of_prologue))),
    "before bases are due": (0, (_Pass, "backward", failing_on(_Pass.backward, 1))),
    "a new basis": (0, (ProjectedTensor, "adopt", failing_on(ProjectedTensor.adopt))),
    "a look": (2, (tensor_steps, "squares", look_but_one)),
    "an update": (2, (LowRankOptimizer, "_apply", apply_but_one)),
    "nan": (2, (_Pass, "backward", failing_on(_Pass.backward, 1, do=spoil))),
    "nan after a new basis": (0, (_Pass, "backward", failing_on(_Pass.backward, 0, do=spoil))),
}
SPOILT = {"nan": 1, "nan after a new basis": 0}  # the block


def fail(how, guilty, clip):
    """What each fault ends in, in this process; and that all can go on together after it, and leave the step."""
    found = {}
    with job("cpu") as team:
        for name, (step, fault) in FAULTS.items():
            _, optimizer, order = chain_of(team, how, FIXED, clip=clip)
            for number in range(step):
                take(order, number)
            with replaced([fault] if team.rank == guilty else []):
                try:
                    with team.together("the end of a step"):
                        take(order, step)
                except Exception as error:
                    found[name] = type(error).__name__, str(error)
            team.meet(f"after {name}")
            optimizer.skip()
            team.meet(f"the step without {name}")
    return found


@pytest.mark.parametrize(
    ("how", "guilty", "clip"),
    [
        ("replicate", 1, 0.0),
        pytest.param("shard", 1, 0.0, marks=pytest.mark.slow),
        pytest.param("shard", 1, 0.5, marks=pytest.mark.slow),
    ],
)
def test_all_hear_of_a_failure_wherever_it_happens(how, guilty, clip):
    answers = run_in(2, fail, how, guilty, clip)
    for rank, found in enumerate(answers):
        assert list(found) == list(FAULTS)
        for name, (kind, words) in found.items():
            if name in SPOILT:  # the sum is, and so every process finds it, or hears of it
                assert kind == NumericalError.__name__
                assert f"the gradient of blocks.{SPOILT[name]}.layer is not finite" in words
            elif rank == guilty:
                assert (kind, words) == ("KeyError", "'a bug'"), name
            else:
                assert (kind, words) == (RankError.__name__, f"rank {guilty}: KeyError: 'a bug'"), name


def cannot_go_on(how):
    """One process fails going back, and then has no memory for the zeros with which it would take part."""
    with job("cpu") as team:
        _, _, order = chain_of(team, how, FIXED)
        take(order, 0)
        faults = [FAULTS["block"][1], (reducing, "_or_zeros", failing_on(reducing._or_zeros))]
        with replaced(faults if team.rank else []):
            try:
                with team.together("the end of a step"):
                    take(order, 1)
            except (KeyError, RankError) as error:
                return type(error).__name__, str(error)


@pytest.mark.parametrize("how", ["replicate", pytest.param("shard", marks=pytest.mark.slow)])
def test_one_that_cannot_take_part_any_more_ends_and_is_missed(how):
    (kind, words), guilty = run_in(2, cannot_go_on, how)
    assert guilty == ("KeyError", "'a bug'")
    assert kind == RankError.__name__
    assert "another process of the job has ended" in words


def another_way(self):
    raise NotWalkableError("another way")


def unwalkable():
    """What a run and a loop of one's own say when a micro-batch of one process takes another way."""
    with job("cpu") as team:
        model, optimizer, order = chain_of(team, "replicate", FIXED)
        found, mine = [], [(1, number) for number in team.deal(range(MICRO_BATCHES))]
        for one in (lambda: take(order, 1), lambda: qgalore.step(model, optimizer, mine, loss=Chain.loss)):
            one()
            with replaced([(_Pass, "_prologues", another_way)] if team.rank else []):
                try:
                    with team.together("the end of a step"):
                        one()
                except ConfigError as error:
                    found.append(str(error))
            optimizer.skip()
        return found


def test_all_hear_what_to_do_about_a_micro_batch_that_takes_another_way():
    for rank, found in enumerate(run_in(2, unwalkable)):
        assert ["another way" in words and words.startswith("rank 1: ") == (rank == 0) for words in found] == [True] * 2
        assert ["train.order=batch_major" in found[0], "stepping='deferred'" in found[1]] == [True] * 2


def meetings(how, times):
    """Of an ordinary step through three blocks, or several times as many."""
    met, own = [], Team._meeting

    def counted(self, place, *words):
        met.append(place)
        return own(self, place, *words)

    with job("cpu") as team:
        _, optimizer, order = chain_of(team, how, FIXED, times=times)
        for step in range(2):  # the last block's basis waits for the second
            take(order, step)
        assert len(optimizer.events) == 3 * times
        with replaced([(Team, "_meeting", counted)]):
            take(order, 2)
        assert len(optimizer.events) == 3 * times
    return met


@pytest.mark.parametrize("how", ["replicate", "shard"])
def test_a_walk_has_one_meeting_whatever_the_number_of_blocks(how):
    for times in (1, 3):
        assert run_in(2, meetings, how, times) == [["the loss of a step"]] * 2
