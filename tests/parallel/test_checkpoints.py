"""Checkpoints that the processes of a job write and read together."""

import os
import re
import resource
import sys
from pathlib import Path

from helpers import assert_same, save_checkpoint
from jobs import chain_of, codes, live, take
from processes import run_in
from safetensors.torch import load_file

from qgalore.errors import ConfigError, RankError
from qgalore.files import checkpoint
from qgalore.files.safetensors import Copied
from qgalore.parallel import ALONE, job
from qgalore.parallel.stages import Beside
from qgalore.training.keeping import Keeper
from qgalore.training.position import Position

HOW = ("replicate", "shard")
STEPS = [checkpoint.name_for(step) for step in (1, 2, 3)]
FILES = ("model.safetensors", "optimizer.safetensors")


def model_and_optimizer(how, team, steps=0):
    """Sums are exact, so after the same steps all numbers of processes hold the same bits."""
    model, optimizer, order = chain_of(team, how, {})
    for step in range(steps):
        take(order, step)
    return model, optimizer


def save(where, how, team, step=1):
    model, optimizer = model_and_optimizer(how, team, step)
    return save_checkpoint(where / STEPS[step - 1], model, optimizer.state_dict(), {"position": {}}, team)


def write_and_read(where, source):
    """Save the state after a step, and again what is read from the checkpoints that ``source`` processes made."""
    with job("cpu") as team:
        for how in HOW:
            save(where / f"{how}-{team.size}", how, team)
            if source is not None:
                path = where / f"{how}-{source}" / STEPS[0]
                model, optimizer = model_and_optimizer(how, team)
                checkpoint.load_into(path, checkpoint.read_state(path, team), model, optimizer)
                again = where / f"{how}-{source}-{team.size}" / STEPS[0]
                save_checkpoint(again, model, optimizer.state_dict(), {"position": {}}, team)


def test_any_number_of_processes_writes_the_same_files(tmp_path):
    for size, source in ((1, None), (4, 1), (2, 4)):
        run_in(size, write_and_read, tmp_path, source)
    for name in FILES:
        one = tmp_path / "replicate-1" / STEPS[0] / name
        for how in HOW:
            for size in (1, 2, 4):
                assert (tmp_path / f"{how}-{size}" / STEPS[0] / name).read_bytes() == one.read_bytes(), (
                    how,
                    size,
                    name,
                )
            for again in ("1-4", "4-2"):  # what is read comes in another order
                assert_same(load_file(tmp_path / f"{how}-{again}" / STEPS[0] / name), load_file(one))


def write_beside(where):
    """Save the state after a step at once, and once more from a copy while the next step is taken, sums included."""
    with job("cpu") as team:
        for how in HOW:
            save(where / f"{how}-now", how, team)
            model, optimizer, order = chain_of(team, how, {})
            take(order, 0)
            path = where / f"{how}-beside" / STEPS[0]
            draft = checkpoint.begin(path, model, optimizer.state_dict(), {"position": {}}, team)
            assert draft.copy()
            writing = Beside("a test", draft.stages(), team)
            for step in (1, 2):
                writing.look()
                take(order, step)
            writing.wait()
            assert writing.look()


def test_processes_write_the_same_files_beside_their_next_step(tmp_path):
    run_in(2, write_beside, tmp_path)
    for how in HOW:
        for name in (*FILES, checkpoint.STATE):
            now, beside = (tmp_path / f"{how}-{when}" / STEPS[0] / name for when in ("now", "beside"))
            assert now.read_bytes() == beside.read_bytes(), (how, name)


def keep_beside(where, how):
    """What each process says to a second checkpoint, written beside training, in which rank 1 meets a full disk
    ("full"), is lost ("lost"), or has no memory for its copy ("room")."""
    with job("cpu") as team:
        os.chdir(where)
        model, optimizer = model_and_optimizer("shard", team, 1)
        room = 0 if how == "room" and team.rank == 1 else 1 << 40
        keeper = Keeper(Path(), save_every=1, keep_last=1, keep_every=None, team=team, room=lambda: room)
        keeper.save(Position(step=1), model, optimizer, {})
        write, limits = Copied.write, resource.getrlimit(resource.RLIMIT_FSIZE)

        def into_a_full_disk(copied, path):
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
            try:
                return write(copied, path)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)

        if team.rank == 1:
            Copied.write = {"full": into_a_full_disk, "lost": lambda *_: sys.exit(9), "room": write}[how]
        keeper.save(Position(step=2), model, optimizer, {}, beside=True)
        at_once = Path(STEPS[1]).exists()
        try:
            while keeper._writing is not None:
                keeper.look()
        except (ConfigError, RankError) as error:
            if isinstance(error, ConfigError):
                team.meet("afterwards")
            return str(error), sorted(os.listdir())
        return at_once, sorted(os.listdir())


def test_a_full_disk_beside_training_is_said_by_all(tmp_path):
    found = run_in(2, keep_beside, tmp_path, "full")
    assert found[0][0].startswith("rank 1: ")
    for message, there in found:
        assert "step-00000002 could not be written: [Errno 27] File too large. Older checkpoints are intact" in message
        assert there == [STEPS[0]]


def test_a_process_lost_beside_training_costs_no_older_checkpoint(tmp_path):
    (message, there), code = run_in(2, keep_beside, tmp_path, "lost")
    assert (code, there) == (9, [STEPS[0]])
    assert "another process of the job has ended" in message


def test_all_wait_if_one_has_no_room_for_its_copy(tmp_path):
    assert run_in(2, keep_beside, tmp_path, "room") == [(True, [STEPS[1]])] * 2


def fail(where, how):
    """What each process says to a save that fails in one alone, what is there then, and what after another."""
    with job("cpu") as team:
        run = where / str(team.rank) if how == "apart" else where
        run.mkdir(exist_ok=True)
        os.chdir(run)
        model, optimizer = model_and_optimizer("replicate" if how == "apart" else "shard", team, 1)
        state, limits = optimizer.state_dict(), resource.getrlimit(resource.RLIMIT_FSIZE)
        save_checkpoint(Path(STEPS[0]), model, state, {"position": {}}, ALONE if how == "apart" else team)
        if how == "full" and team.rank == 1:  # the operating system lets none of its files grow further
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        if how == "lost" and team.rank == 1:  # after the first of two files
            write = checkpoint.write_share
            checkpoint.write_share = lambda path, *rest: sys.exit(9) if "optim" in path.name else write(path, *rest)
        try:
            save_checkpoint(Path(STEPS[1]), model, state, {"position": {}}, team)
        except RankError as error:
            return str(error), sorted(os.listdir())
        except ConfigError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            team.meet("afterwards")
            there = sorted(os.listdir())
            team.meet("nothing is half written")
            if how == "full":
                save_checkpoint(Path(STEPS[2]), model, state, {"position": {}}, team)
            return str(error), there, checkpoint.newest_of(checkpoint.steps_in(Path()), team)[0].name


def test_a_failed_write_of_one_process_stops_all(tmp_path):
    found = run_in(2, fail, tmp_path, "full")
    assert found[0][0].startswith("rank 1: ")
    for message, there, newest in found:
        assert "step-00000002 could not be written: [Errno 27] File too large. Older checkpoints are intact" in message
        assert (there, newest) == ([STEPS[0]], STEPS[2])


def test_a_process_lost_while_it_writes_leaves_nothing(tmp_path):
    (message, there), code = run_in(2, fail, tmp_path, "lost")
    assert (code, there) == (9, [STEPS[0]])
    assert "another process of the job has ended" in message


def test_a_disk_that_is_not_the_same_for_all_is_found_out(tmp_path, folder):
    for message, there, newest in run_in(2, fail, tmp_path, "apart"):
        assert "which rank 0 made, is not there; all processes must see one disk" in message
        assert (there, newest) == ([STEPS[0]], STEPS[0])
    found = run_in(2, start_apart, folder)
    assert codes(found) == {2}
    assert "set run.dir to a folder on a disk that all machines share" in found[0][1]


def start_apart(where):
    """A run of which each process has a folder of its own."""
    mine = where / os.environ["RANK"]
    mine.mkdir(exist_ok=True)
    (mine / "tiny.yaml").write_text((where / "tiny.yaml").read_text())
    return live(mine, [])


def read_damaged(where):
    """What is said of a checkpoint with one bit changed: the file, the place, and what there is to say."""
    with job("cpu") as team:
        for step in (1, 2):
            save(where, "shard", team, step)
        answers = []
        for name in FILES:
            path = where / STEPS[1] / name
            good = path.read_bytes()
            for place in (0, len(good) // 2, len(good) - 1):
                team.meet("all have read")
                if team.leads:
                    path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
                team.meet("damaged")
                found, _, complaints = checkpoint.newest_of(checkpoint.steps_in(where), team)
                answers.append((name, place, found.name, [str(complaint) for complaint in complaints]))
            path.write_bytes(good)
        return answers


def test_damage_that_one_process_finds_is_named_by_all(tmp_path):
    one, other = run_in(2, read_damaged, tmp_path)
    assert one == other
    for name, place, newest, (complaint,) in one:
        assert (newest, name in complaint) == (STEPS[0], True)
        first, end = re.search(r"bytes ([\d,]+) to ([\d,]+) does not match", complaint).groups()
        assert int(first.replace(",", "")) <= place < int(end.replace(",", ""))
