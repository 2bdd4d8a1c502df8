"""One door for every program: what each kind of error ends in."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qgalore import errors
from qgalore.cli import arguments, door
from qgalore.parallel.environment import world_size

ROOT = Path(__file__).resolve().parents[2]


def raising(error):
    def work():
        print("before")
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (errors.ConfigError("a is 1"), 2, "error: a is 1\n"),
        (errors.DoesNotFitError("too large"), 3, "error: too large\n"),
        (errors.NumericalError("nan"), 4, "error: nan\n"),
        (errors.RankError("rank 3"), 1, "error: rank 3\n"),
        (errors.Interrupted("saved", signal.SIGTERM), 143, "\nsaved\n"),
        (errors.ConfigError("a\x1b[2J\x07b\udc80"), 2, "error: a\\x1b[2J\\x07b\\udc80\n"),
        (FileNotFoundError(2, "No such file or directory", "shard"), 2, "error: shard: No such file or directory. "),
        (PermissionError(13, "Permission denied", "x"), 2, "error: x: Permission denied. Change its permissions"),
        (OSError("model has no file"), 2, "error: model has no file\n"),
        (KeyboardInterrupt(), 130, "\ngo on\n"),
    ],
)
def test_errors_become_a_message_and_a_code(error, code, told, capfd):
    assert door.leave(raising(error), "go on") == code
    output = capfd.readouterr()
    assert output.out == "before\n"
    assert output.err.startswith(told)
    assert "Traceback" not in output.err


def test_a_fault_of_ours_shows_itself():
    with pytest.raises(ZeroDivisionError):
        door.leave(lambda: 1 // 0)


def test_a_result_is_the_code():
    assert door.leave(lambda: None) == 0
    assert door.leave(lambda: 7) == 7


@pytest.mark.skipif(not hasattr(signal, "SIGPIPE"), reason="no pipes that break")
def test_a_reader_that_leaves_ends_the_program_without_a_word():
    work = "lambda: [print('line ' * 100) for _ in range(9999)] and None"
    code = f"import sys; from qgalore.cli import door; sys.exit(door.leave({work}))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, text=True
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 128 + signal.SIGPIPE


def test_output_that_a_terminal_cannot_show_is_written_out():
    code = "import sys; from qgalore.cli import door; sys.exit(door.leave(lambda: print('Δ × 2')))"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert (answer.returncode, answer.stdout) == (0, "\\u0394 \\xd7 2\n")


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is ''"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE is '-2'"),
        ({"WORLD_SIZE": "²"}, "WORLD_SIZE is '²'"),
        ({"WORLD_SIZE": "9" * 30}, "WORLD_SIZE is '999"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is '2'"),
        ({"WORLD_SIZE": "2", "RANK": "first"}, "RANK is 'first'"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "gpu"}, "LOCAL_RANK is 'gpu'"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_PORT is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "x"}, "MASTER_PORT is 'x'"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "1"}, "MASTER_ADDR is not set"),
    ],
)
def test_nonsense_about_processes_is_refused_at_once(monkeypatch, given, named):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert world_size() == 1
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(errors.ConfigError) as error:
        world_size()
    assert named in str(error.value)


def test_a_checkpoint_stands_for_itself_and_a_run_needs_a_usable_one(tmp_path):
    newest = tmp_path / "run" / "checkpoints" / "step-00000010"
    newest.mkdir(parents=True)
    (newest / "state.json").write_text("{}")
    assert arguments.saved_folder(newest) == newest
    for source in (tmp_path / "run", tmp_path / "run" / "checkpoints"):
        with pytest.raises(errors.ConfigError, match="holds no usable checkpoint"):
            arguments.saved_folder(source)
    with pytest.raises(errors.ConfigError, match="is a file"):
        arguments.saved_folder(newest / "state.json")
