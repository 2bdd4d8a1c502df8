"""One process at a time in a run's folder, and a lock that ends with whoever held it."""

import errno
import gc
import json
import os
from pathlib import Path

import pytest
from helpers import another_process_holds

from qgalore.data.paths import make_folder
from qgalore.data.tokenizer import train_tokenizer
from qgalore.errors import ConfigError
from qgalore.training import run_lock
from qgalore.training.run_lock import RunLock


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path):
    with another_process_holds(tmp_path) as child:
        for _ in range(2):
            with pytest.raises(ConfigError, match=rf"is in use: process {child} on .*run\.name"):
                RunLock(tmp_path)
    lock = RunLock(tmp_path)
    assert lock.works
    assert os.listdir(tmp_path) == [".lock"]


def refused(folder):
    """Whether another process cannot have the lock."""
    child = os.fork()
    if not child:
        try:
            RunLock(folder)
        except ConfigError:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


def test_it_is_held_until_the_last_object_of_a_process_lets_go(tmp_path):
    first, second = RunLock(tmp_path), RunLock(tmp_path / ".")
    first.release()
    first.release()
    assert refused(tmp_path)
    del second
    gc.collect()
    assert not refused(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys, number):
    def cannot(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(run_lock, "_lock", cannot)
    assert not RunLock(tmp_path).works
    assert "cannot lock files" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(ConfigError, match="cannot be written"):
        RunLock(tmp_path / "gone")


@pytest.mark.parametrize("beside", [(), ("notes.txt",)])
def test_a_lock_that_nothing_came_of_is_taken_away(tmp_path, beside):
    """With the folders that were made for it, and never with what lay there before or came since."""
    for name in beside:
        (tmp_path / name).touch()
    RunLock(tmp_path).release()
    assert os.listdir(tmp_path) == [*beside]
    folder = tmp_path / "a" / "b"
    for others, stays in (((), [*beside]), (("config.yaml",), ["a", *beside])):
        lock = RunLock(folder, make_folder(folder))
        for name in others:
            (folder / name).touch()
        lock.release()
        assert sorted(os.listdir(tmp_path)) == stays
    assert sorted(os.listdir(folder)) == [".lock", "config.yaml"]
    (folder / "config.yaml").unlink()
    RunLock(folder).release()
    assert os.listdir(folder) == [".lock"], "it was there before"


@pytest.mark.parametrize(
    ("more", "code", "stays"),
    [
        (["data.valid=gone.txt"], 2, set()),
        (["model.overrides.hidden_size=7"], 2, set()),
        (["data.train=late.jsonl", "data.valid=late.jsonl", "data.tokenizer=tokenizer"], 2, set()),
        (["data.valid_fraction=0.0001", "data.valid=null", "data.tokenizer=tokenizer"], 2, {"own"}),
    ],
)
def test_a_refused_start_leaves_nothing(tiny_run, more, code, stays):
    """But for tokens in the cache, which the next start takes from there."""
    train_tokenizer(["a row of a text"], vocab_size=300).save_pretrained("tokenizer")
    rows = [json.dumps({"text": "a row"})] * 300 + ["{no row"]
    Path("late.jsonl").write_text("\n".join(rows))
    before = {path.name for path in Path().iterdir()}
    found, _, err = tiny_run("run.dir=runs/of/mine", "data.cache_dir=own", *more)
    assert found == code, err
    assert {path.name for path in Path().iterdir()} - before == stays
    Path("runs/of/mine/tiny").mkdir(parents=True)
    assert tiny_run("run.dir=runs/of/mine", "data.cache_dir=own", *more)[0] == code
    assert list(Path("runs").rglob("*")) == [Path("runs/of"), Path("runs/of/mine"), Path("runs/of/mine/tiny")]


def test_a_lock_that_was_just_taken_away_is_none(tmp_path, monkeypatch):
    """Between opening the file and locking it another process may delete it, and a third one make a new one."""
    real = run_lock._lock

    def late(descriptor):
        (tmp_path / ".lock").unlink()
        (tmp_path / ".lock").touch()
        real(descriptor)

    monkeypatch.setattr(run_lock, "_lock", late)
    with pytest.raises(ConfigError, match="is in use"):
        RunLock(tmp_path)
