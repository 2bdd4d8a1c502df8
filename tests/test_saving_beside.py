"""A checkpoint that is written while training goes on, from a copy of the state."""

import resource
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers import assert_same, final_state, no_file_larger_than, save_checkpoint, trained

from qgalore.errors import ConfigError, NumericalError
from qgalore.files import checkpoint, safetensors
from qgalore.files.safetensors import Copied, Deferred, Rows
from qgalore.memory import machine
from qgalore.memory.plan import Plan
from qgalore.parallel.stages import complete
from qgalore.training import keeping
from qgalore.training.keeping import Keeper
from qgalore.training.limits import Limit
from qgalore.training.position import Position

FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
TEXT = {"config": {"a": 1}, "position": {"step": 1, "losses": [2.0]}}


def overwrite(model, state):
    """What training does to the tensors that a checkpoint was begun with, and more."""
    for value in model.state_dict().values():
        value.detach().zero_()
    for slot in state["slots"].values():
        for name, value in (slot["inner"] | slot["extra"]).items():
            if torch.is_tensor(value) and not name.startswith("qmap"):  # that is one table of all optimizers
                value.zero_()
        slot.get("schedule", {}).update(gap=-1)


def test_what_changes_after_the_copy_is_not_in_the_files(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors, "PIECE", 5000)  # many pieces, and tensors that lie in two of them
    model, opt = trained(tiny_llama, torch.bfloat16, tie_word_embeddings=True)
    run_state, state = {**TEXT, "position": {"step": 1, "losses": [2.0]}}, opt.state_dict()
    save_checkpoint(tmp_path / "now" / "step-00000001", model, state, run_state)
    draft = checkpoint.begin(tmp_path / "later" / "step-00000001", model, state, run_state)
    size = draft.copy_bytes()
    assert draft.copy()
    overwrite(model, state)
    run_state["position"]["losses"].append(7.0)
    assert not (tmp_path / "later" / "step-00000001").exists()
    complete("a test", draft.stages())
    for name in FILES:
        now, later = (tmp_path / when / "step-00000001" / name for when in ("now", "later"))
        assert now.read_bytes() == later.read_bytes(), name
    assert size == sum((tmp_path / "now" / "step-00000001" / name).stat().st_size for name in FILES[:2])


def test_every_kind_of_entry_is_copied_to_its_place(tmp_path, monkeypatch):
    """Rows that two processes hold, a tensor that is made late, one that is not contiguous, one of no elements."""
    monkeypatch.setattr(safetensors, "PIECE", 100)
    rows = torch.arange(60.0).view(6, 10)
    others = {
        "a.turned": torch.arange(77, dtype=torch.int16).view(7, 11).t(),
        "b.late": Deferred(torch.bfloat16, (3, 5), lambda: torch.full((3, 5), 2.5, dtype=torch.bfloat16)),
        "c.none": torch.empty(0, 4),
    }
    safetensors.write_safetensors(tmp_path / "whole", {**others, "d.rows": rows})
    parts = {"dtype": rows.dtype, "shape": (6, 10), "holders": ((0, rows[:2].nbytes), (1, rows[2:].nbytes))}
    entries = [{**others, "d.rows": Rows(part.clone(), **parts)} for part in (rows[:2], rows[2:])]
    safetensors.create(tmp_path / "shared", entries[0])
    seals = []
    for rank in (0, 1):
        copied = Copied(entries[rank], rank, 2)
        entries[rank]["d.rows"].here.fill_(-1)
        seals.append(copied.write(tmp_path / "shared"))
        assert safetensors.share_bytes(entries[rank], rank, 2) == sum(count for _, count, _ in seals[-1])
    assert (tmp_path / "shared").read_bytes() == (tmp_path / "whole").read_bytes()
    size = (tmp_path / "shared").stat().st_size
    assert safetensors.altered(tmp_path / "shared", safetensors.joined(seals, size)) is None


class Gate:
    """Holds back every write from a copy until it is opened, and notes the threads that came."""

    def __init__(self, monkeypatch):
        self.come, self.opened, self.threads = threading.Event(), threading.Event(), []
        write = Copied.write

        def held(copied, path):
            self.threads.append(threading.current_thread())
            self.come.set()
            assert self.opened.wait(60)
            return write(copied, path)

        monkeypatch.setattr(Copied, "write", held)

    @contextmanager
    def opening_soon(self):
        """For a block that waits; it has not waited if the gate is still shut at its end."""
        timer = threading.Timer(0.2, self.opened.set)
        timer.start()
        yield
        assert self.opened.is_set()
        timer.join()


@pytest.fixture
def gate(monkeypatch):
    gate = Gate(monkeypatch)
    yield gate
    gate.opened.set()


@pytest.fixture(scope="module")
def state():
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return trained(lambda: LlamaForCausalLM(LlamaConfig(**shape, **heads)))


class Saver:
    """A keeper of the last two checkpoints, with one before them."""

    def __init__(self, folder, state, room=lambda: 1 << 40):
        self.folder, self.state = folder, state
        self.keeper = Keeper(folder, save_every=1, keep_last=1, keep_every=None, room=room)
        self.save(1, beside=False)

    def save(self, step, beside=True):
        return self.keeper.save(Position(step=step), *self.state, {}, beside=beside)

    @property
    def steps(self):
        return [checkpoint.step_of(path) for path in checkpoint.steps_in(self.folder)]


@pytest.fixture
def saver(tmp_path, state):
    return Saver(tmp_path / "checkpoints", state)


def test_it_is_there_when_it_is_written_and_the_older_one_goes_then(saver, gate):
    path = saver.save(2)
    for _ in range(3):
        saver.keeper.look()
    assert (path.exists(), saver.steps) == (False, [1])
    gate.opened.set()
    saver.keeper.wait()
    assert saver.steps == [2]
    assert checkpoint.read_state(path)["position"]["step"] == 2
    assert threading.main_thread() not in gate.threads


WAITING = {
    "the next save": lambda saver: saver.save(3, beside=False),
    "a rollback": lambda saver: saver.keeper.newest(lambda: saver.keeper.regular(None)),
    "leaving": lambda saver: saver.keeper.leave(2),
    "the end": lambda saver: saver.keeper.to_the_end().__enter__() or saver.keeper.wait(),
}


@pytest.mark.parametrize("who", WAITING)
def test_who_needs_it_waits_for_it(saver, gate, who):
    saver.save(2)
    with gate.opening_soon():
        answer = WAITING[who](saver)
    assert saver.steps == ([3] if who == "the next save" else [2])
    if who == "a rollback":
        assert answer[0].name == "step-00000002"


def save_and_fail(saver, error, between=lambda: None):
    """Training that ends with ``error`` after it has begun a checkpoint."""
    with saver.keeper.to_the_end():
        saver.save(2)
        between()
        raise error


def test_an_error_in_training_does_not_cost_it(saver, gate):
    with gate.opening_soon(), pytest.raises(NumericalError):
        save_and_fail(saver, NumericalError("a bad step"))
    assert saver.steps == [2]


def test_a_second_interruption_waits_for_nothing(saver, gate):
    with pytest.raises(KeyboardInterrupt):
        save_and_fail(saver, KeyboardInterrupt())
    assert saver.steps == [1]
    gate.opened.set()
    saver.keeper.wait()  # so that the thread ends before its folder does


FULL = r"step-00000002 could not be written: \[Errno 27\] File too large. Older checkpoints are intact; free space"


def look_until_it_is_written(saver, gate):
    gate.opened.set()
    while saver.keeper._writing is not None:
        saver.keeper.look()


def test_a_disk_that_fills_up_is_said_at_the_next_look(saver, gate):
    saver.save(2)
    saver.keeper.look()
    with no_file_larger_than(100), pytest.raises(ConfigError, match=FULL):
        look_until_it_is_written(saver, gate)
    assert [path.name for path in saver.folder.iterdir()] == ["step-00000001"]
    saver.keeper.wait()  # it was said
    saver.save(3)
    saver.keeper.wait()
    assert saver.steps == [3]


def test_a_full_disk_after_an_error_in_training_is_said_as_well(saver, gate, capsys):
    def fill_the_disk():
        with no_file_larger_than(100):
            gate.opened.set()
            assert gate.come.wait(60)
            gate.threads[0].join()

    with pytest.raises(NumericalError):
        save_and_fail(saver, NumericalError("a bad step"), fill_the_disk)
    assert "step-00000002 could not be written" in capsys.readouterr().out
    assert saver.steps == [1]


@pytest.mark.parametrize(
    ("room", "said"), [(lambda: 1000, "1000 B are free for it"), (lambda: None, "it is not known what is free")]
)
def test_without_room_training_waits_and_one_line_says_so(tmp_path, state, gate, capsys, room, said):
    saver = Saver(tmp_path / "checkpoints", state, room)
    for step in (2, 3):
        assert saver.save(step).exists()
    out = capsys.readouterr().out
    assert out.count("training waits while a checkpoint is written") == 1
    assert said in out
    assert not gate.threads


def test_memory_that_the_system_refuses_is_no_error(saver, gate, capsys, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(Copied, "__init__", refuse)
    assert saver.save(2).exists()
    assert "training waits while a checkpoint is written" in capsys.readouterr().out


def test_the_end_of_a_long_write_is_announced(saver, gate, capsys, monkeypatch):
    monkeypatch.setattr(keeping, "LONG", 0.1)
    path = saver.save(2)
    with gate.opening_soon():
        saver.keeper.wait()
    assert f"{path} is complete, 0s after its step" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("device", "budget", "host", "room"),
    [
        ("cpu", None, None, 10_000 - 1050 - 300),  # all that this machine has for the process
        ("cpu", 2000, None, 2000 - 1050 - 300),
        ("cpu", 20_000, None, 10_000 - 1050 - 300),
        ("cpu", 1000, None, -350),
        ("cuda", 500, None, 10_000 - 4000 - 300),  # the budget is the device's
        ("cuda", None, 700, 400),
    ],
)
def test_the_room_for_a_copy(monkeypatch, device, budget, host, room):
    monkeypatch.setattr(machine, "available", lambda device: 10_000)
    monkeypatch.setattr(machine, "resident_set", lambda: 4000)
    found = Plan({"weights": 600}, {"temporaries": 300}, {"the rest": 100}, {"inputs": 300})
    assert Limit(budget, "a test", host).room_for_copy(found, torch.device(device)) == room


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_a_container_has_written_is_not_in_the_way(monkeypatch, tmp_path):
    """A control group counts files as used memory that it gives back when asked, such as the last checkpoint."""
    for name, text in (("max", "9000"), ("current", "8000"), ("stat", "anon 1000\ninactive_file 6500\nfile 7000\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    monkeypatch.setattr(machine, "CONTROL_GROUP", tmp_path)
    monkeypatch.setattr(machine, "resident_set", lambda: 500)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert machine.available(torch.device("cpu")) == 9000 - 8000 + 6500 + 500


def test_a_run_whose_disk_fills_up_beside_it_stops_and_goes_on(tiny_run, monkeypatch):
    """All but the last checkpoint are written by threads. The second of them finds the disk full."""
    write, threads, limits = Copied.write, [], resource.getrlimit(resource.RLIMIT_FSIZE)

    def into_a_full_disk(copied, path):
        threads.append(threading.current_thread())
        if "step-00000004" not in str(path):
            return write(copied, path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # the run's records are shorter
        try:
            return write(copied, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    how = ("export.formats=[]", "train.keep_last=9")
    assert tiny_run("run.name=whole", *how)[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(Copied, "write", into_a_full_disk)
        code, _, err = tiny_run("run.name=cut", *how)
    assert code == 2
    assert "step-00000004 could not be written: [Errno 27] File too large. Older checkpoints are intact" in err
    there = sorted(path.name for path in Path("runs/cut/checkpoints").iterdir())
    assert there == ["step-00000000", "step-00000002"]
    assert threads
    assert threading.main_thread() not in threads
    code, out, err = tiny_run("run.name=cut", *how, "--resume", "auto")
    assert code == 0, err
    assert "step-00000002, after step 2" in out
    assert "from a copy, which takes" in out
    assert_same(final_state("runs/whole"), final_state("runs/cut"))
