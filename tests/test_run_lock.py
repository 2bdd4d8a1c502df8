"""One process at a time in a run's folder, and a lock that ends with whoever held it."""

import errno
import gc
import os

import pytest
from helpers import another_process_holds

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
