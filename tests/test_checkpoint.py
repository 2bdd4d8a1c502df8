"""Checkpoints survive crashes and full disks, and a damaged one is never loaded."""

import errno
import json
import os
import random
import re
import shutil
import sys

import pytest
import torch
from helpers import mutate, no_file_larger_than, prune_checkpoints, save_checkpoint, trained
from safetensors.torch import load_file

from qgalore.errors import ConfigError
from qgalore.files import checkpoint

TEXT = {"config": {"a": 1}, "position": {"step": 1, "sample": [0, 4], "tokens": 9}}


def everything(model, opt):
    parts = {f"model.{n}": v for n, v in model.state_dict().items()}
    for slot, state in opt.state_dict()["slots"].items():
        for kind in ("inner", "extra"):
            parts |= {f"{slot}.{kind}.{n}": torch.as_tensor(v).clone() for n, v in state[kind].items()}
        parts |= {f"{slot}.{n}": torch.tensor(v) for n, v in state.get("schedule", {}).items()}
    return parts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("embeddings", ["full", "int8"])
def test_round_trip_is_bit_for_bit(tiny_llama, tmp_path, dtype, tied, embeddings):
    model, opt = trained(tiny_llama, dtype, tie_word_embeddings=tied, embeddings=embeddings)
    path = save_checkpoint(tmp_path / "step-00000001", model, opt.state_dict(), TEXT)
    wanted = {name: value.clone() for name, value in everything(model, opt).items()}
    other, fresh = trained(tiny_llama, dtype, steps=1, tie_word_embeddings=tied, embeddings=embeddings)
    state = checkpoint.read_state(path)
    assert {key: state[key] for key in TEXT} == TEXT
    checkpoint.load_into(path, state, other, fresh)
    got = everything(other, fresh)
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert got[name].dtype == value.dtype, name
        assert torch.equal(got[name], value), name


def test_the_files_are_safetensors_and_json(tiny_llama, tmp_path):
    model, opt = trained(tiny_llama, tie_word_embeddings=True)
    path = save_checkpoint(tmp_path / "step-00000001", model, opt.state_dict(), TEXT)
    assert {p.name for p in path.iterdir()} == {"model.safetensors", "optimizer.safetensors", "state.json"}
    read = load_file(path / "model.safetensors")
    assert set(model.state_dict()) - set(read) == {"lm_head.weight"}  # tied: stored once
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in read.items())
    assert list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_of_another_version_is_refused(tiny_llama, tmp_path):
    model, opt = trained(tiny_llama, num_hidden_layers=1)
    path = save_checkpoint(tmp_path / "step-00000001", model, opt.state_dict(), TEXT)
    state = json.loads((path / "state.json").read_text())
    del state["sha256"]
    state["version"] = 2
    (path / "state.json").write_text(json.dumps({**state, "sha256": checkpoint.seal_of(state)}))
    with pytest.raises(checkpoint.DamagedError, match="checkpoint version 2; this program reads version 3"):
        checkpoint.read_state(path)


def test_another_models_checkpoint_is_refused(tiny_llama, tmp_path):
    model, opt = trained(tiny_llama)
    path = save_checkpoint(tmp_path / "step-00000001", model, opt.state_dict(), TEXT)
    for changes, message in (
        ({"num_hidden_layers": 1}, "no tensor"),
        ({"intermediate_size": 128}, "in the checkpoint"),
    ):
        other, fresh = trained(tiny_llama, **changes)
        with pytest.raises(ConfigError, match=message):
            checkpoint.load_into(path, checkpoint.read_state(path), other, fresh)


def test_no_mutation_is_loaded_or_crashes(tiny_llama, tmp_path):
    """300 damaged copies: every one is refused with a message, and the undamaged one before it is found instead."""
    model, opt = trained(tiny_llama, num_hidden_layers=1)
    good = save_checkpoint(tmp_path / "step-00000001", model, opt.state_dict(), TEXT)
    bad = tmp_path / "step-00000002"
    rng = random.Random(0)
    for case in range(300):
        shutil.copytree(good, bad)
        how = mutate(bad, rng)
        with pytest.raises(checkpoint.DamagedError):
            raise AssertionError(f"case {case}: {how} was accepted: {checkpoint.read_state(bad)['version']}")
        found, state, complaints = checkpoint.newest_of(checkpoint.steps_in(tmp_path))
        assert (found, len(complaints)) == (good, 1), how
        assert state["position"]["step"] == 1
        shutil.rmtree(bad)


class Crash(BaseException):
    """The end of the process."""


class Fault:
    """Raises ``error`` at the n-th file operation on a checkpoint, through Python's audit events. After a crash every
    operation is refused, as to a process that has died; audit hooks cannot be removed, so it goes quiet."""

    EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "shutil.rmtree")

    def __init__(self, at: int, error: BaseException) -> None:
        self.at, self.error, self.seen, self.active = at, error, 0, False
        self.sync = os.fsync
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple) -> None:
        if self.active and event in self.EVENTS and "step-" in str(arguments[0]):
            self.count()

    def count(self) -> None:
        self.seen += 1
        if self.seen == self.at or (isinstance(self.error, Crash) and self.seen > self.at):
            raise self.error

    def fsync(self, descriptor: int) -> None:
        """fsync raises no audit event, so it is counted here."""
        self.count()
        self.sync(descriptor)

    def __enter__(self) -> "Fault":
        self.active, os.fsync = True, self.fsync
        return self

    def __exit__(self, *_: object) -> None:
        self.active, os.fsync = False, self.sync


FAULTS = {
    "ENOSPC": OSError(errno.ENOSPC, "No space left on device"),
    "EIO": OSError(errno.EIO, "Input/output error"),
    "crash": Crash(),
}


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("again", [False, True], ids=["new", "damaged-there"])
def test_every_file_operation_may_fail_once(tiny_llama, tmp_path, kind, again):
    """Whatever operation of a save and its pruning fails, the newest complete checkpoint is found, and saving again
    works."""
    model, opt = trained(tiny_llama, num_hidden_layers=1)
    state = opt.state_dict()
    at, finished = 0, False
    while not finished:
        at += 1
        folder = tmp_path / str(at)
        for step in (1, 2):
            save_checkpoint(folder / checkpoint.name_for(step), model, state, TEXT)
        if again:
            (folder / checkpoint.name_for(3)).mkdir()
        try:
            with Fault(at, FAULTS[kind]) as fault:
                save_checkpoint(folder / checkpoint.name_for(3), model, state, TEXT)
                prune_checkpoints(folder / checkpoint.name_for(3), 2)
            finished = fault.seen < at
        except (ConfigError, Crash):
            assert fault.seen >= at
        found, document, _ = checkpoint.newest_of(checkpoint.steps_in(folder))
        assert found is not None
        assert document["position"] == TEXT["position"]
        save_checkpoint(folder / checkpoint.name_for(4), model, state, TEXT)
        prune_checkpoints(folder / checkpoint.name_for(4), 2)
        assert checkpoint.newest_of(checkpoint.steps_in(folder))[0].name == checkpoint.name_for(4)
        assert not list(folder.glob(".*"))
    assert at > 8


@pytest.mark.parametrize("limit", [0, 100, 20_000])
def test_a_disk_that_fills_up_while_writing(tiny_llama, tmp_path, limit):
    """The operating system refuses to let any file grow past ``limit`` bytes."""
    model, opt = trained(tiny_llama, num_hidden_layers=1)
    good = save_checkpoint(tmp_path / "step-00000001", model, opt.state_dict(), TEXT)
    refused = pytest.raises(ConfigError, match=r"could not be written.*Older checkpoints are intact")
    with refused, no_file_larger_than(limit):
        save_checkpoint(tmp_path / "step-00000002", model, opt.state_dict(), TEXT)
    assert list(tmp_path.iterdir()) == [good]
    assert checkpoint.newest_of([good])[0] == good


def test_free_space_is_checked_before_writing(tiny_llama, tmp_path, monkeypatch):
    model, opt = trained(tiny_llama, num_hidden_layers=1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ConfigError, match=r"needs .* MiB and the disk has 0\.0 MiB free"):
        save_checkpoint(tmp_path / "step-00000001", model, opt.state_dict(), TEXT)
    assert list(tmp_path.iterdir()) == []


def test_prune_keeps_the_newest(tiny_llama, tmp_path):
    model, opt = trained(tiny_llama, num_hidden_layers=1)
    for step in (1, 5, 10, 100):
        save_checkpoint(tmp_path / checkpoint.name_for(step), model, opt.state_dict(), TEXT)
    prune_checkpoints(tmp_path / checkpoint.name_for(100), 2)
    assert [p.name for p in checkpoint.steps_in(tmp_path)] == ["step-00000010", "step-00000100"]


def test_pruning_counts_older_ones_and_verifies_the_newest_first(tiny_llama, tmp_path):
    model, opt = trained(tiny_llama, num_hidden_layers=1)

    def names():
        return [checkpoint.step_of(p) for p in checkpoint.steps_in(tmp_path)]

    for step in (1, 2, 3, 9):
        save_checkpoint(tmp_path / checkpoint.name_for(step), model, opt.state_dict(), TEXT)
    newest = tmp_path / checkpoint.name_for(3)
    prune_checkpoints(newest, 7)  # more than there are
    assert names() == [1, 2, 3, 9]
    good = (newest / "model.safetensors").read_bytes()
    (newest / "model.safetensors").write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(ConfigError, match=r"does not read back as it was: .*was altered.*Older checkpoints are kept"):
        prune_checkpoints(newest, 1)
    assert names() == [1, 2, 3, 9]
    (newest / "model.safetensors").write_bytes(good)
    prune_checkpoints(newest, 2, keep_steps=[1])
    assert names() == [1, 2, 3, 9]
    prune_checkpoints(newest, 1, keep_steps=[1])
    assert names() == [1, 3, 9]  # 9 is later: of another course, neither counted nor deleted


def test_nothing_that_is_not_ours_is_deleted(tiny_llama, tmp_path, capsys):
    model, opt = trained(tiny_llama, num_hidden_layers=1)
    theirs = (".git", ".snapshot", ".step-notes", ".step-00000001.backup", "step-²", "step-1", "step-00000001.bak", "x")
    for name in theirs:
        (tmp_path / name).mkdir()
        (tmp_path / name / "kept").write_text("mine")
    for name in (".step-00000007.0123abcd.tmp", ".step-00000007.0123abcd.old", ".step-00000003.deleted"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("half")
    (tmp_path / ".step-00000003.deleted" / "mine.txt").write_text("mine")
    for step in (1, 2, 3):
        save_checkpoint(tmp_path / checkpoint.name_for(step), model, opt.state_dict(), TEXT)
    (tmp_path / "step-00000001" / "notes.txt").write_text("mine")
    assert [checkpoint.step_of(p) for p in checkpoint.steps_in(tmp_path)] == [1, 2, 3]
    prune_checkpoints(tmp_path / "step-00000003", 1)
    left = {"left-step-00000001", "left-step-00000003"}
    assert {p.name for p in tmp_path.iterdir()} == {*theirs, *left, "step-00000003"}
    assert all((tmp_path / name / "kept").read_text() == "mine" for name in theirs)
    assert [p.name for p in (tmp_path / "left-step-00000001").iterdir()] == ["notes.txt"]
    assert "left-step-00000001 holds notes.txt, which no run wrote" in capsys.readouterr().out
    (tmp_path / "step-00000003").rename(tmp_path / "step-00000004")
    assert checkpoint.set_aside(tmp_path, 3) == [tmp_path / "left-step-00000004"]
    (tmp_path / "step-00000005").write_text("a file of that name")
    save_checkpoint(tmp_path / "step-00000005", model, opt.state_dict(), TEXT)
    assert (tmp_path / "left-step-00000005").read_text() == "a file of that name"


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(ConfigError, match="cannot be listed"):
        checkpoint.steps_in(tmp_path / "checkpoints")
    assert checkpoint.steps_in(tmp_path / "nowhere") == []
    for step in (99_999_999, 100_000_000):
        (tmp_path / checkpoint.name_for(step)).mkdir()
    assert [checkpoint.step_of(p) for p in checkpoint.steps_in(tmp_path)] == [99_999_999, 100_000_000]


def test_another_position_under_the_same_name_is_kept_aside(tiny_llama, tmp_path):
    model, opt = trained(tiny_llama, num_hidden_layers=1)
    path = save_checkpoint(tmp_path / "step-00000001", model, opt.state_dict(), TEXT)
    other = {**TEXT, "position": {**TEXT["position"], "order": 1}}
    save_checkpoint(path, model, opt.state_dict(), other)
    assert checkpoint.read_state(path)["position"]["order"] == 1
    assert checkpoint.read_state(tmp_path / "left-step-00000001")["position"] == TEXT["position"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["model.norm.weight", "model.layers.0.mlp.up_proj.weight_scale", "inner"])
def test_values_that_are_not_finite_are_refused_by_name(tiny_llama, tmp_path, bad, where):
    model, opt = trained(tiny_llama, num_hidden_layers=1)
    state = opt.state_dict()
    if where == "inner":
        slot, parts = next((n, p) for n, p in state["slots"].items() if "absmax2" in p["inner"])
        parts["inner"]["absmax2"].view(-1)[0] = bad
        where = f"{slot}|inner|absmax2"
    else:
        model.state_dict()[where].view(-1)[-1] = bad
    path = save_checkpoint(tmp_path / "step-00000001", model, state, TEXT)
    other, fresh = trained(tiny_llama, num_hidden_layers=1)
    with pytest.raises(ConfigError, match=re.escape(f"{where} holds values that are not finite")):
        checkpoint.load_into(path, checkpoint.read_state(path), other, fresh)


def test_the_newest_usable_checkpoint_of_a_run(tiny_llama, tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"no usable checkpoint.*saved none yet"):
        checkpoint.newest_in(tmp_path)
    model, opt = trained(tiny_llama, num_hidden_layers=1)
    path = save_checkpoint(tmp_path / "checkpoints" / "step-00000001", model, opt.state_dict(), TEXT)
    (tmp_path / "checkpoints" / "step-00000002").mkdir()
    assert checkpoint.newest_in(tmp_path) == path
    assert "step-00000002 is not a complete checkpoint" in capsys.readouterr().out


def test_a_complete_checkpoint_of_the_step_is_left_alone(tiny_llama, tmp_path):
    model, opt = trained(tiny_llama, num_hidden_layers=1)
    path = save_checkpoint(tmp_path / "step-00000001", model, opt.state_dict(), TEXT)
    before = (path / "model.safetensors").stat().st_mtime_ns
    save_checkpoint(path, model, opt.state_dict(), TEXT)
    assert (path / "model.safetensors").stat().st_mtime_ns == before
