"""The processes of an attempt find each other on a store that attempts before it have used."""

import random
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch import distributed as dist

from qgalore.parallel.roster import fresh_store

PATIENCE = timedelta(seconds=60)


@pytest.fixture
def stores():
    """Makes clients of one store, as torchrun's agent keeps it."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return lambda: dist.TCPStore("127.0.0.1", server.port, is_master=False)


def attempt(stores, size, number):
    """One attempt whose processes come at random moments and leave their address; what each finds of the others."""
    rng = random.Random(number)
    delays = [rng.uniform(0.0, 0.2) for _ in range(size)]

    def live(rank):
        time.sleep(delays[rank])
        store = fresh_store(stores(), rank, size, PATIENCE)
        found = [] if not store.check([f"address/{rank}"]) else ["somebody was here"]
        store.set(f"address/{rank}", f"attempt {number}, rank {rank}")
        return found + [store.get(f"address/{other}").decode() for other in range(size)]

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(live, range(size)))


@pytest.mark.parametrize("size", [2, 5])
def test_no_attempt_reads_what_another_wrote(stores, size):
    for number in range(6):
        wanted = [f"attempt {number}, rank {rank}" for rank in range(size)]
        assert attempt(stores, size, number) == [wanted] * size


def test_those_who_die_while_they_wait_are_not_waited_for(stores):
    moment = timedelta(seconds=0.1)
    for rank in (1, 2, 0):  # each leaves its word, and rank 0 a list with the dead of whom none agrees
        with pytest.raises(dist.DistStoreError, match="not all of 3 processes"):
            fresh_store(stores(), rank, 3, moment)
    wanted = [f"attempt 0, rank {rank}" for rank in range(3)]
    assert attempt(stores, 3, 0) == [wanted] * 3


def test_a_process_that_never_comes_is_an_error_in_time(stores):
    with pytest.raises(dist.DistStoreError, match=r"not all of 2 processes came within 0:00:00\.1"):
        fresh_store(stores(), 1, 2, timedelta(seconds=0.1))


STARTED = """
import os, sys, time
count, port = (os.environ[name] for name in ("TORCHELASTIC_RESTART_COUNT", "MASTER_PORT"))
path = f"rank{os.environ['RANK']}"
first = not os.path.exists(path)
with open(path, "a") as file:
    print(count, port, os.environ["TORCHELASTIC_USE_AGENT_STORE"], file=file)
if first:  # one fails, and the other would go on
    while len(os.listdir()) < 3:
        time.sleep(0.02)
    if os.environ["RANK"] == "0":
        time.sleep(60)
    sys.exit(1)
"""


@pytest.mark.slow
def test_torchrun_keeps_its_store_and_does_not_count_attempts(tmp_path):
    """Why there is a roster at all. If this fails, a prefix for each count of restarts may do in its place."""
    (tmp_path / "started.py").write_text(STARTED)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    meeting = ["--rdzv_id=mine", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--max-restarts=1", *meeting, "started.py"]
    machines = [subprocess.Popen(torchrun, cwd=tmp_path, stderr=subprocess.DEVNULL) for _ in "ab"]
    assert [machine.wait(timeout=100) for machine in machines] == [0, 0]
    (whole, again), (failed, last) = ((tmp_path / f"rank{rank}").read_text().splitlines() for rank in range(2))
    assert whole == again == failed, "the same count, port and store of the agent"
    assert last == failed.replace("0", "1", 1), "who failed counts"
    assert whole.endswith("True")
