"""Rows of split blocks that wait in host memory. On a CPU that is the memory where blocks are gathered, too."""

import contextlib
import io
import os
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_same
from jobs import MICRO_BATCHES, assert_same_steps, chain_of, codes, live, rows, state, walked_steps
from processes import run_in
from records import timeless
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from qgalore import config
from qgalore.lowrank.layers.linear import LowRankLinear
from qgalore.lowrank.rules import RULES, RuleOptions
from qgalore.lowrank.tensor_steps import squares
from qgalore.models import streaming
from qgalore.parallel import job, shards
from qgalore.replacing import replaced

SLOW = pytest.mark.slow
WEIGHTS = ["parallel=shard", "train.order=layer_major", "memory.stream=weights"]


@pytest.mark.parametrize(
    ("size", "how", "clip", "options"),
    [
        (2, "shard", 0.0, {}),
        pytest.param(3, "shard", 100.0, {"rule": "muon"}, marks=SLOW),  # whose rows do not divide
        pytest.param(4, 2, 0.0, {}, marks=SLOW),
    ],
)
def test_rows_on_the_host_take_the_steps_of_one_process(size, how, clip, options):
    ((wanted, refreshed),) = run_in(1, walked_steps, how, 7, clip, options)
    for found, events in run_in(size, walked_steps, how, 7, clip, options, MICRO_BATCHES, True):
        assert events == refreshed
        assert_same_steps(found, wanted)


def copied():
    """Of each parameter that FSDP2 gathers of a model with rows on the host, and of another one: whether it is copied
    from there first, and where it waits."""
    with job("cpu") as team:
        models = [chain_of(team, "shard", {}, on_host=on_host)[0] for on_host in (True, False)]
        units = [[block._get_fsdp_state()._fsdp_param_group for block in model.blocks] for model in models]
        gathered = [[one for unit in some for one in unit.fsdp_params] for some in units]
        return [[(p.offload_to_cpu, p.pin_memory, p.sharded_param.device.type) for p in some] for some in gathered]


def test_what_is_gathered_is_copied_from_the_host_first():
    for found in run_in(2, copied):
        for on_host, of_model in zip((True, False), found, strict=True):
            assert len(of_model) == 3 * 4
            assert set(of_model) == {(on_host, False, "cpu")}  # no pages are locked where no GPU reads them


def test_memory_is_given_where_rows_wait_and_not_where_they_are_gathered():
    """On a mesh of GPUs."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        mesh = DeviceMesh.from_group(torch.distributed.group.WORLD, "cuda", mesh_dim_names=("shard",))
        shape = {"shape": torch.Size((5, 4)), "stride": (4, 1)}
        rows_ = torch.empty(2, 4, dtype=torch.int8, device="meta")
        layer = torch.nn.Module()
        shared = DTensor.from_local(rows_, mesh, [Shard(0)], run_check=False, **shape)
        layer.weight = torch.nn.Parameter(shared, requires_grad=False)
        streaming.allocate(layer, torch.device("meta"), in_host_memory={id(layer.weight)})
        assert shards.local(layer.weight).device.type == "cpu"
        assert torch.equal(shards.local(layer.weight), torch.zeros(2, 4, dtype=torch.int8))
        assert layer.weight.shape == (5, 4)
    finally:
        torch.distributed.destroy_process_group()


def test_what_gradients_meet_is_made_where_they_come_and_not_where_rows_wait():
    """State of rules, and the zeros that one process adds for what another one owns: sums group tensors by device."""
    layer = LowRankLinear(torch.ones(64, 64), None, rank=8, group_size=64)
    layer.probe = torch.nn.Parameter(torch.zeros(64, 64, device="meta"))
    for shared, device in ((True, "meta"), (False, "cpu")):
        with replaced([(shards, "is_shared", lambda tensor, shared=shared: shared)]):
            kept = [RULES[name](layer, 0, RuleOptions(rank=8)).tensors() for name in ("muon", "fira", "apollo")]
        states = [value for some in kept for name, value in some.items() if name != "written"]
        assert {value.device.type for value in states} == {device}
        assert len(states) > 3
    elsewhere = SimpleNamespace(elsewhere=True, owner=1, stored=layer.weight, leaves=lambda: [layer.probe])
    assert [square.device.type for square in squares([elsewhere], lambda owned: None)] == ["meta"]


def planned_and_real(where, arguments):
    """The plan of a run's host memory and of its weights on the device, and the bytes of the rows that wait."""
    from qgalore.lowrank.tensors.splitting import places_in
    from qgalore.training import assemble

    os.chdir(where)
    with job("cpu") as team, contextlib.redirect_stdout(io.StringIO()) as said:
        made = assemble.build(config.load("tiny.yaml", arguments), None, team)
        made.loop.run()
        waiting = [shards.local(place.rows) for place in places_in(made.model)]
        real = sum(rows_.nbytes for rows_ in waiting if rows_.device.type == "cpu")
        return made.planned.host, made.planned.resident, real, said.getvalue()


def test_the_plan_has_the_rows_on_the_host_and_one_block_of_them_on_the_way(folder):
    short = [*WEIGHTS, "train.max_steps=1", "train.eval_batches=1", "lowrank.weight_format=int8"]
    short += ["train.grad_accumulation=2", "data.sequence_length=16"]
    for host, resident, real, said in run_in(2, planned_and_real, str(folder), short):
        assert host["blocks (page-locked)"] == real
        assert [resident[name] for name in ("int8 weights", "weight scales", "bases")] == [0, 0, 0]
        assert resident["rows of a block that comes"] == real // 2  # of two blocks that are alike
        assert "rows of 2 blocks in" in said
        copies = f"{2 * real / 1e9:.1f} GB of rows to the device"
        assert copies in said


@pytest.mark.slow
@pytest.mark.parametrize("options", [["train.clip_grad_norm=0.5"], ["lowrank.rule=muon", "lowrank.embeddings=int8"]])
def test_whole_runs_have_the_bits_of_rows_on_the_device(folder, options):
    """With an evaluation, and a run that stops and goes on with its rows elsewhere."""
    run = [
        *WEIGHTS,
        *options,
        "train.lr_schedule=constant",
        "train.grad_accumulation=2",
        "lowrank.update_proj_gap=2",
        "train.eval_every=2",
    ]
    device = [*run, "memory.stream=none", "run.name=device", "train.max_steps=4"]
    assert codes(run_in(2, live, str(folder), device)) == {0}
    assert codes(run_in(2, live, str(folder), [*run, "run.name=host", "train.max_steps=4"])) == {0}
    assert timeless(folder / "runs/host/metrics.jsonl") == timeless(folder / "runs/device/metrics.jsonl")
    assert_same(state(folder / "runs/host", 4), state(folder / "runs/device", 4))
    for size, steps in ((2, 5), (1, 6)):  # in one process nothing is split, and records are streamed
        longer = ["--resume", "auto", f"train.max_steps={steps}"]
        assert codes(run_in(size, live, str(folder), [*run, "run.name=host", "memory.stream=none", *longer])) == {0}
        assert codes(run_in(size, live, str(folder), [*device, *longer, "memory.stream=weights"])) == {0}
        assert_same(state(folder / "runs/host", steps), state(folder / "runs/device", steps))
    assert [row["step"] for row in rows(folder / "runs/host", "eval_loss")]
