"""What the processes of a run say to each other in a step, and that they do not go on with different numbers."""

import os
from functools import partial

import pytest
from jobs import live, rows
from processes import run_in
from torch import distributed as dist

from qgalore.data.mixing import MixedOrder, Mixture
from qgalore.errors import ConfigError
from qgalore.parallel import Team
from qgalore.replacing import replaced
from qgalore.training import loop
from qgalore.training.stepping import LayerMajor

WAITED_FOR = ("all_gather", "all_gather_object", "broadcast", "broadcast_object_list", "all_reduce", "barrier")
SHORT = ["train.order=layer_major", "train.max_steps=5", "train.eval_every=5", "train.save_every=5"]
SHORT += ["train.eval_batches=1", "train.grad_accumulation=2", "lowrank.update_proj_gap=50", "sample.max_new_tokens=0"]


def parting(folder, arguments):
    """A run whose ranks 1 and above have another gradient norm in its fourth step: how it ends, and what each of its
    collectives that are waited for is, or where all meet by it."""
    said, meeting, take = [], Team._meeting, LayerMajor.take

    def met(self, place, *words):
        said.append(place)
        return meeting(self, place, *words)

    def sent(name, own, *given, async_op=False, **more):
        if not async_op:
            said.append(name)
        return own(*given, async_op=async_op, **more) if name in ("all_gather", "all_reduce") else own(*given, **more)

    def parted(self, step, *given):
        loss, norm = take(self, step, *given)
        return loss, norm + (step == 3 and self.optimizer.team.rank)

    wires = [(dist, name, partial(sent, name, getattr(dist, name))) for name in WAITED_FOR]
    with replaced([*wires, (Team, "_meeting", met), (LayerMajor, "take", parted)]):
        return live(folder, arguments), said


def test_a_step_agrees_once_on_its_loss_and_once_at_its_end(folder):
    ((code, words), said), other = run_in(2, parting, str(folder), SHORT)
    assert (code, other) == (1, 1), words
    assert "the processes hold different numbers at: the end of step 4 (" in words
    third = said[said.index("the end of step 2") + 1 : said.index("the end of step 3") + 1]
    # the loss, once all have gone forward and before a weight moves, with what has gradients behind the blocks; and the
    # end, with its number, gradients' norm, signals, clock and errors
    assert third == ["the loss of a step", "the end of step 3"]


def failing_between(folder, arguments, guilty, owner, what):
    """A run one of whose processes fails between two steps, in the work ``what`` of ``owner``, which it does alone."""
    own, alone, steps = getattr(owner, what), loop.Loop._alone, []

    def looking(self, work):
        steps.append(self.position.step)
        return alone(self, work)

    def full(*given):
        if steps and steps[-1] == 2:
            raise ConfigError("the disk is full")
        return own(*given)

    faults = [(loop.Loop, "_alone", looking), (owner, what, full)]
    with replaced(faults if int(os.environ["RANK"]) == guilty else []):
        return live(folder, arguments)


@pytest.mark.parametrize(
    ("how", "guilty", "owner", "what"),
    [
        ("shard", 0, loop.Loop, "_record"),
        pytest.param("shard", 1, MixedOrder, "take", marks=pytest.mark.slow),
        pytest.param("replicate", 1, Mixture, "batch", marks=pytest.mark.slow),
    ],
)
def test_one_that_fails_between_two_steps_goes_on_gathering_until_all_have_heard(folder, how, guilty, owner, what):
    (code, words), other = run_in(2, failing_between, str(folder), [*SHORT, f"parallel={how}"], guilty, owner, what)
    assert (code, other) == (2, 2), words
    assert ("" if guilty == 0 else "rank 1: ") + "the disk is full" in words
    assert [row["step"] for row in rows(folder / "runs/tiny", "lr")] == ([1] if guilty == 0 else [1, 2])
