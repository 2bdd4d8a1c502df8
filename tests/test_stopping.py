"""Signals become requests; a terminal that is gone does not cost the state."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qgalore.training.stopping import StopSignal


class Gone:
    """A terminal after a hang-up."""

    def write(self, text=""):
        raise OSError(5, "Input/output error")

    flush = write


@pytest.fixture(autouse=True)
def heard():
    """What these tests send is not ignored, also where nohup started them, or a shell in the background."""
    usual = {signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number):
    os.kill(os.getpid(), number)


def test_a_hangup_is_a_request_and_may_come_twice(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Gone())
    monkeypatch.setattr(sys, "stderr", Gone())
    before = signal.getsignal(signal.SIGHUP)
    with StopSignal() as stop:
        send(signal.SIGHUP)
        send(signal.SIGHUP)
        print("still here", flush=True)
        print("here too", file=sys.stderr)
        assert stop.number == signal.SIGHUP
    assert signal.getsignal(signal.SIGHUP) == before


def test_a_hangup_after_another_signal_is_no_second_one(capsys):
    with StopSignal() as stop:
        send(signal.SIGTERM)
        send(signal.SIGHUP)
        assert stop.number == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):  # a second one acts at once
            send(signal.SIGINT)
    assert "SIGTERM: finishing this step" in capsys.readouterr().out


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            send(signal.SIGHUP)
            assert stop.number is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_reader_that_goes_is_a_request_and_not_an_error(tmp_path):
    script = (
        "import sys\n"
        "from qgalore.training.stopping import StopSignal\n"
        "sys.stdin.read(1)\n"
        "with StopSignal() as stop:\n"
        "    for line in range(3):\n"
        "        print('a line', flush=True)\n"
        "print('after', flush=True)\n"
        "sys.exit(stop.number)\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    program = subprocess.Popen([sys.executable, "-c", script], **pipes, cwd=Path(__file__).parent.parent)
    program.stdout.close()
    program.stdin.write(b"x")
    program.stdin.close()
    said = program.stderr.read()
    assert (program.wait(), said) == (13, b"")
