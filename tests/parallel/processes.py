"""Starts the processes of a job on this machine, as torchrun would."""

import multiprocessing
import os
import queue
import socket
import sys
import time
import traceback

TIMEOUT = 300.0  # a hang fails


def _live(work, arguments, environment, answers):
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    try:
        answers.put((int(environment["RANK"]), work(*arguments), None))
    except SystemExit as end:
        answers.put((int(environment["RANK"]), end.code, None))
    except BaseException:
        answers.put((int(environment["RANK"]), None, traceback.format_exc()))
    sys.stdout.flush()


def _context(module):
    # A server that has imported everything but computed nothing forks each process: threads do not survive a fork.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["train", "qgalore.training.assemble", "qgalore.training.loop", "bitsandbytes.optim", module]
    )
    return context


def run_in(size, work, *arguments):
    """What ``work(*arguments)``, of an importable module, returns in each of ``size`` processes, by rank."""
    context = _context(work.__module__)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(size)}
    answers = context.Queue()
    started = []
    for rank in range(size):
        environment = {**address, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        started.append(context.Process(target=_live, args=(work, arguments, environment, answers)))
        started[-1].start()
    found, end = {}, time.monotonic() + TIMEOUT
    try:
        while len(found) < size:
            try:
                rank, result, error = answers.get(timeout=1)
            except queue.Empty:
                died = [rank for rank, process in enumerate(started) if process.exitcode and rank not in found]
                assert not died, f"ranks {died} ended without an answer"
                assert time.monotonic() < end, f"ranks {sorted(set(range(size)) - set(found))} hang"
                continue
            assert error is None, f"rank {rank}:\n{error}"
            found[rank] = result
    finally:
        for process in started:
            process.join(10)
            process.kill()
    return [found[rank] for rank in range(size)]
