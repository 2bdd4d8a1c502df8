"""Whole runs of ``train.py`` in several processes that split the weights."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT
from helpers import assert_same
from jobs import codes, live, rows, state
from labelled import write_body, write_table
from processes import run_in
from records import planned_and_real, timeless
from safetensors.torch import load_file

from qgalore.replacing import replaced
from qgalore.training import assemble, loop, spikes

SHARD = ["parallel=shard", "train.order=layer_major"]


def test_two_processes_train_save_and_one_goes_on(folder):
    short = [
        *SHARD,
        "train.eval_every=4",
        "train.save_every=2",
        "train.eval_batches=2",
        "train.clip_grad_norm=0.5",
    ]
    first = [*short, "train.max_steps=4"]
    got = run_in(2, live, str(folder), first, (1, 2, "nan"))
    assert codes(got) == {0}, got
    made = rows(folder / "runs/tiny", "lr")
    assert [row.get("skipped") for row in made] == [None, None, "rank 1: the loss is nan in step 3", None]
    model, _ = assemble.restore_model(folder / "runs/tiny/checkpoints/step-00000004")
    saved = state(folder / "runs/tiny", 4)
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items() if name in saved)
    name = "model.layers.0.mlp.up_proj"
    assert saved[f"{name}|inner|state1"].shape == (160, 16)
    assert run_in(1, live, str(folder), [*short, "train.max_steps=5", "--resume", "auto"]) == [(0, "")]
    assert not torch.equal(state(folder / "runs/tiny", 5)[f"{name}.weight"], saved[f"{name}.weight"])


@pytest.mark.slow
def test_the_same_run_in_one_two_and_four_processes(folder):
    """As in ``test_runs``: losses differ by the order of fp32 sums. Evaluation is that of one process."""
    plain = [
        *SHARD,
        "lowrank.proj_type=right",
        "method=galore",
        "lowrank.policy=fixed",
        "train.clip_grad_norm=0.5",
        "train.optimizer=adamw",
    ]
    for size in (1, 2, 4):
        assert codes(run_in(size, live, str(folder), [*plain, f"run.name=p{size}"])) == {0}
    one = rows(folder / "runs/p1", "lr")
    for size in (2, 4):
        other = rows(folder / f"runs/p{size}", "lr")
        assert [row["tokens"] for row in one] == [row["tokens"] for row in other]
        for a, b in zip(one, other, strict=True):
            assert abs(a["loss"] - b["loss"]) <= (1e-6 if a["step"] <= 3 else 1e-4) * a["loss"], (size, a["step"])
            assert abs(a["grad_norm"] - b["grad_norm"]) <= 1e-2 * a["grad_norm"], (size, a["step"])
        print(size, max(abs(a["loss"] - b["loss"]) / a["loss"] for a, b in zip(one, other, strict=True)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["lowrank.rule=muon", "train.clip_grad_norm=0"],
        ["lowrank.rule=fira", "train.full_gradients=keep", "train.clip_grad_norm=0.5"],
        ["lowrank.embeddings=int8", "train.grad_accumulation=4"],
        ["model.compute=int8", "lowrank.group_size=row", "train.activation_checkpointing=2"],
        ["train.optimizer=torch.optim.Adafactor", "train.optimizer_options={eps: [null, 1.0]}", "lowrank.moments=keep"],
        ["method=galore", "lowrank.proj_type=full", "train.optimizer=adamw4bit", "lowrank.stagger=false"],
        ["model.compile=blocks", "lowrank.update_proj_gap=4"],
    ],
    ids=["muon", "fira", "int8 embeddings", "int8 products", "adafactor", "both sides", "compiled"],
)
def test_two_that_split_the_weights_have_the_bits_of_two_that_do_not(folder, options):
    """A sum of two does not hang on its order. So losses, records and checkpoints are equal, to the bit."""
    run = ["train.order=layer_major", "train.max_steps=4", "train.grad_accumulation=2", "lowrank.update_proj_gap=2"]
    for how in ("replicate", "shard"):
        arguments = [*run, *options, f"parallel={how}", f"run.name={how}"]
        assert run_in(2, live, str(folder), arguments) == [(0, "")] * 2
    for name in ("metrics.jsonl", "subspace.jsonl", "updates.jsonl"):
        whole, split = (timeless(folder / "runs" / how / name) for how in ("replicate", "shard"))
        assert split == whole
        assert whole or name != "metrics.jsonl"
    assert_same(state(folder / "runs/shard", 4), state(folder / "runs/replicate", 4))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_two_that_split_a_classifier_have_the_bits_of_two_that_do_not(tmp_path, kind):
    write_table(tmp_path / "train.tsv", 60, 1)
    write_table(tmp_path / "dev.tsv", 20, 2)
    write_body(tmp_path / kind, kind)
    data = {"task": "classify", "train": "train.tsv", "valid": "dev.tsv", "text_keys": ["one", "two"]}
    train = {"max_steps": 4, "micro_batch_size": 4, "grad_accumulation": 2, "lr": 0.003, "eval_every": 2}
    config = {"device": "cpu", "model": {"path": kind}, "data": data, "train": train, "export": {"formats": []}}
    config["lowrank"] = {"rank": 8, "update_proj_gap": 3}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    for how in ("replicate", "shard"):
        arguments = ["data.sequence_length=64", f"parallel={how}", f"run.name={how}"]
        assert run_in(2, live, str(tmp_path), arguments) == [(0, "")] * 2
    whole, split = (timeless(tmp_path / "runs" / how / "metrics.jsonl") for how in ("replicate", "shard"))
    assert split == whole
    assert any("eval_loss" in row for row in whole)
    assert_same(state(tmp_path / "runs/shard", 4), state(tmp_path / "runs/replicate", 4))


def spiking(folder, arguments):
    """A run whose sixth loss is a spike, if it was not rolled back before."""
    share = loop.Loop._share

    def far(self, batch, tokens):
        return share(self, batch, tokens) * (100 if (self.position.step, self.position.order) == (5, 0) else 1)

    with replaced([(spikes, "LEAST", 3), (loop.Loop, "_share", far)]):
        return live(folder, arguments)


@pytest.mark.slow
def test_a_rollback_and_then_a_restart_of_the_schedule_have_the_bits_of_two_that_do_not_split(folder):
    run = ["train.order=layer_major", "train.grad_accumulation=2", "lowrank.update_proj_gap=2", "train.eval_batches=2"]
    back = [*run, "train.max_steps=8", "train.save_every=4", "train.loss_spike=rollback"]
    for how in ("replicate", "shard"):
        assert run_in(2, spiking, str(folder), [*back, f"parallel={how}", f"run.name={how}"]) == [(0, "")] * 2
        saved = str(folder / "runs" / how / "checkpoints/step-00000008")
        assert json.loads((Path(saved) / "state.json").read_text())["position"]["order"] == 1
        again = [*run, "train.max_steps=2", f"parallel={how}", f"run.name={how}-again", "--resume", saved]
        assert run_in(2, live, str(folder), [*again, "train.restart_schedule=true"]) == [(0, "")] * 2
    for name, step in (("", 8), ("-again", 2)):
        whole, split = (folder / "runs" / f"{how}{name}" for how in ("replicate", "shard"))
        for records in ("metrics.jsonl", "subspace.jsonl"):
            assert timeless(split / records) == timeless(whole / records)
        assert_same(state(split, step), state(whole, step))
    first, *_ = rows(folder / "runs/shard-again", "eval_loss")  # of what was loaded, and not of what was there before
    assert first["eval_loss"] == pytest.approx(rows(folder / "runs/shard", "eval_loss")[-1]["eval_loss"], rel=1e-6)


def saving_beside(folder, arguments):
    """Whether a checkpoint of step 4 is complete when the last of ten steps begins. Each step waits until what is
    written beside it has come to the end of a stage."""
    step, found = loop.Loop._step, []

    def slowly(self):
        writing = self.course.keeper._writing
        while writing is not None and not writing._doing.done():
            time.sleep(0.01)
        found.append(self.course.keeper.path(4).exists())
        return step(self)

    with replaced([(loop.Loop, "_step", slowly)]):
        assert live(folder, arguments) == (0, "")
    return found


@pytest.mark.slow
def test_a_checkpoint_beside_training_is_complete_before_the_next_one_is_due(folder):
    run = [*SHARD, "train.max_steps=10", "train.save_every=4", "train.eval_every=20", "train.eval_batches=1"]
    for found in run_in(2, saving_beside, str(folder), [*run, "train.grad_accumulation=2"]):
        assert len(found) == 10
        assert found[3:5] == [False, False]  # the copy is made, and training goes on
        assert found[7]  # the eighth step, after which the next is saved


@pytest.mark.slow
def test_saved_by_one_four_and_two_exported_by_one(folder):
    first = [*SHARD, "run.name=r", "train.lr_schedule=constant", "train.activation_checkpointing=true"]
    assert codes(run_in(1, live, str(folder), [*first, "train.max_steps=4"])) == {0}
    assert codes(run_in(4, live, str(folder), [*first, "train.max_steps=20", "--resume", "auto"])) == {0}
    whole = [*first, "train.max_steps=30", "--resume", "auto", "export.formats=[hf]"]
    assert codes(run_in(2, live, str(folder), whole)) == {0}
    done = folder / "runs/r/checkpoints/step-00000030"
    command = [sys.executable, str(ROOT / "tools/export.py"), str(done), "--format", "hf", "--out", str(folder / "hf")]
    subprocess.run(command, check=True, timeout=300, capture_output=True)
    exported = load_file(folder / "hf/model.safetensors")
    assert_same(exported, load_file(folder / "runs/r/export/hf/model.safetensors"))
    model, _ = assemble.restore_model(done)
    layer = model.model.layers[0].mlp.up_proj
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(exported[name], layer.dense_weight().to(exported[name].dtype))


@pytest.mark.slow
def test_what_four_saved_is_what_they_held(folder):
    """Four go on from their checkpoint of step 10 to the same bits as without a stop; so what is read is what was."""
    run = [*SHARD, "train.max_steps=18", "train.clip_grad_norm=0"]
    assert codes(run_in(4, live, str(folder), [*run, "run.name=whole"])) == {0}
    assert codes(run_in(4, live, str(folder), [*run, "run.name=cut"], (1, 9, "signal"))) == {143}
    assert codes(run_in(4, live, str(folder), [*run, "run.name=cut", "--resume", "auto"])) == {0}
    assert_same(state(folder / "runs/whole", 18), state(folder / "runs/cut", 18))


def test_what_each_process_keeps_is_what_the_plan_says(folder):
    short = [*SHARD, "train.max_steps=2", "train.eval_batches=1", "lowrank.weight_format=int8"]
    found = run_in(2, planned_and_real, str(folder), short)
    (alone, _), *_ = run_in(1, planned_and_real, str(folder), [*short, "run.name=one"])
    losses = [rows(folder / "runs" / name, "lr")[0]["loss"] for name in ("tiny", "one")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)  # the same model was made by rows
    moments = [real.pop("moments") for _, real in found]
    for planned, real in found:
        assert max(moments) == planned.pop("moments")  # of the process that owns most
        vectors = 5 * 64 * 4 + 2 * 8 * 4  # norms and the frequencies of positions, which are whole everywhere
        dense = alone["trained in full"] - vectors
        assert real == planned
        assert real.pop("trained in full") == dense / 2 + vectors
        assert real == {name: size / 2 for name, size in alone.items() if name in real}
    assert max(moments) < 0.6 * alone["moments"]
