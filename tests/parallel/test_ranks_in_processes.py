"""Ranks that are free to move where processes split the weights: owners find them one by one, under one budget."""

import re

import pytest
from helpers import assert_same, save_checkpoint
from jobs import Wire, chain_of, codes, live, state, take, whole
from processes import run_in
from records import planned_and_real, timeless

from qgalore import config
from qgalore.errors import NumericalError
from qgalore.files import checkpoint
from qgalore.memory.traffic import payload
from qgalore.parallel import job
from qgalore.training import assemble

SLOW = pytest.mark.slow
RANKS = (24, 64)  # so small a mean that a layer's rank hangs on what the others have left
STEPS = 9
OPTIONS = {"update_proj_gap": 2, "policy": "fixed", "energy": 1 - 1e-6, "projector": "exact"}
AUTO = ["parallel=shard", "train.order=layer_major", "lowrank.rank=auto"]


def made(team, how, clip=0.0):
    return chain_of(team, how, OPTIONS, STEPS, clip, ranks=RANKS)


def held(team, model, optimizer):
    """All that training changes, as one process has it."""
    found = dict(model.state_dict())
    for slot, parts in optimizer.state_dict()["slots"].items():
        found |= {f"{slot}|{name}": value for name, value in {**parts["inner"], **parts["extra"]}.items()}
    return whole(team, found)


def walked(how, clip=0.0):
    with job("cpu") as team:
        model, optimizer, order = made(team, how, clip)
        for step in range(STEPS):
            take(order, step)
        found = [(event["layer"], event["step"], event["rank"]) for event in optimizer.events]
        assert {name: rank for name, _, rank in found} == {
            f"blocks.{number}.layer": block.layer.rank for number, block in enumerate(model.blocks)
        }
        return held(team, model, optimizer), found


@pytest.fixture(scope="module")
def alone():
    """What one process has in the end, without clipping."""
    return run_in(1, walked, "shard")[0]


@pytest.mark.parametrize(
    ("size", "how", "clip"),
    [(2, "shard", 0.0), pytest.param(3, "shard", 100.0, marks=SLOW), pytest.param(4, 2, 0.0, marks=SLOW)],
)
def test_the_number_of_processes_does_not_show_in_the_ranks(alone, size, how, clip):
    wanted, ranks = run_in(1, walked, how, clip)[0] if clip else alone
    assert len({rank for *_, rank in ranks}) > 3, ranks
    for found, same in run_in(size, walked, how, clip):
        assert same == ranks
        assert found.keys() == wanted.keys()
        assert all((found[name] == value).all() for name, value in wanted.items())


def saved(where, source, first, last):
    """Go on from what ``source`` saved, from step ``first`` to ``last``, and save that; what there is then."""
    with job("cpu") as team:
        model, optimizer, order = made(team, "shard")
        if source is not None:
            checkpoint.load_into(where / source, checkpoint.read_state(where / source, team), model, optimizer)
        for step in range(first, last):
            take(order, step)
        save_checkpoint(where / checkpoint.name_for(last), model, optimizer.state_dict(), {"position": {}}, team)
        return held(team, model, optimizer)


def test_what_two_have_saved_one_goes_on_with_and_back(alone, tmp_path):
    """Between the two and after them ranks change."""
    wanted, ranks = alone
    assert [len({rank for _, step, rank in ranks if step in part}) for part in (range(1, 4), range(4, STEPS))] == [3, 3]
    run_in(2, saved, tmp_path, None, 0, 1)
    run_in(1, saved, tmp_path, checkpoint.name_for(1), 1, 4)
    for found in run_in(2, saved, tmp_path, checkpoint.name_for(4), 4, STEPS):
        assert found.keys() == wanted.keys()
        assert all((found[name] == value).all() for name, value in wanted.items())


class Broadcasts(Wire):
    """Also of tensors that one process sends to all."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "c10d.broadcast_" in str(func):
            self.bytes["broadcast"] += sum(tensor.nbytes for tensor in args[0])
        return super().__torch_dispatch__(func, types, args, kwargs)


def sent():
    """Bytes on the wire in a step that refreshes two layers and in one that refreshes none, and those of the plan."""
    with job("cpu") as team:
        options = {**OPTIONS, "update_proj_gap": 3, "stagger": False}
        model, optimizer, order = chain_of(team, "shard", options, STEPS, ranks=RANKS)
        found = []
        for step in range(4):
            planned = payload(optimizer.tensors, float("inf"))
            with Wire() if step < 3 else Broadcasts() as wire:
                take(order, step)
            found.append((dict(wire.bytes), planned))
        sides = [block.layer.left or block.layer.right for block in model.blocks]
        return found[2:], [side.codes.nbytes + side.scale.nbytes for side in sides]


def test_bases_are_sent_when_they_are_new_and_never_gathered():
    both = run_in(2, sent)
    handed = sum(found[0][0].pop("handed") for found, _ in both)
    for ((ordinary, planned), (refreshing, _)), bases in both:
        norms = 4 * 3
        assert ordinary == {
            "gathered": planned.pop("gather blocks"),
            "reduced": planned.pop("reduce Δ gradients"),
            "summed": planned.pop("all-reduce dense gradients") + norms,
        }
        assert handed == planned.pop("hand out rows")
        assert not any(planned.values())
        assert refreshing["gathered"] == ordinary["gathered"]
        assert refreshing["broadcast"] == bases[0] + bases[1]


def failing():
    with job("cpu") as team:
        _, optimizer, order = made(team, "shard")
        tensor = optimizer.tensors[0]
        if not tensor.elsewhere:

            def fails(*_):
                raise NumericalError("the owner has failed")

            tensor.settle_rank = fails
        with pytest.raises(NumericalError) as error:
            take(order, 0)
        return str(error.value)


def test_all_hear_of_an_owner_that_fails_to_find_a_rank():
    assert sorted(run_in(2, failing)) == ["rank 0: the owner has failed", "the owner has failed"]


@pytest.mark.slow
def test_what_each_process_keeps_is_what_the_plan_says_and_no_more(folder, capsys):
    """With all energy each rank is the largest."""
    short = [*AUTO, "train.max_steps=2", "train.eval_batches=1", "lowrank.energy=1.0", "lowrank.weight_format=int8"]
    both = run_in(2, planned_and_real, str(folder), short)
    assert max(real.pop("moments") for _, real in both) == both[0][0].pop("moments")
    both[1][0].pop("moments")
    assert all(real == planned for planned, real in both)
    assemble.plan(config.load(str(folder / "tiny.yaml"), [*short, "lowrank.mean_rank=8"]), 2)
    bases = re.search(r"bases +([\d.]+) KiB", (shown := capsys.readouterr().out))
    assert float(bases[1]) == pytest.approx(both[0][0]["bases"] / 1024, abs=0.05)  # whatever their mean is
    assert "bases are whole everywhere" in shown


@pytest.mark.slow
def test_two_that_split_have_the_bits_of_two_that_do_not(folder):
    """A sum of two does not hang on its order."""
    run = [*AUTO[1:], "train.max_steps=6", "train.grad_accumulation=2", "lowrank.update_proj_gap=2"]
    run += ["lowrank.max_rank=32", "lowrank.mean_rank=16", "lowrank.policy=energy"]
    for how in ("replicate", "shard"):
        assert codes(run_in(2, live, str(folder), [*run, f"parallel={how}", f"run.name={how}"])) == {0}
    for name in ("metrics.jsonl", "subspace.jsonl"):
        whole_, split = (timeless(folder / "runs" / how / name) for how in ("replicate", "shard"))
        assert split == whole_
    assert_same(state(folder / "runs/shard", 6), state(folder / "runs/replicate", 6))
