"""A run that is tracked while it trains, by the real packages offline, and what does not stop it."""

import json
import os
import shutil
import signal
import sqlite3
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import rows
from poison import BATCH_MAJOR, Poison, PoisonedGradient

from qgalore.convergence import live, records, tensorboard, trackers
from qgalore.errors import ConfigError
from qgalore.training import tracking

SHORT = ("export.formats=[]", "sample.max_new_tokens=0")
FEW = ("train.max_skipped_in_a_row=2", *SHORT)
RUN = Path("runs/tiny")
KEY = "0123456789abcdef" * 2 + "01234567"
Scalars = dict[str, dict[int, float]]  # tag → step → value
Shown = tuple[set[str], Scalars, dict[str, Any]]


def recorded_scalars() -> Scalars:
    """Tag → step → value, of the run's records as ``qgalore convergence`` sends them."""
    found: Scalars = {}
    for tag, value, step in tensorboard.scalars(records.read_run(RUN)):
        found.setdefault(tag, {})[step] = value
    return found


def board(folder: Path) -> tuple[Scalars, str]:
    """The same of what TensorBoard shows, and the text beside it."""
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = loader.EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    found = {}
    for tag in events.Tags()["scalars"]:
        steps = [event.step for event in events.Scalars(tag)]
        assert len(set(steps)) == len(steps), f"{tag} has two values for a step"
        found[tag] = {event.step: event.value for event in events.Scalars(tag)}
    return found, events.Tensors("config/text_summary")[-1].tensor_proto.string_val[0].decode()


def trackio_rows(path: Path) -> Shown:
    """Identities of runs, their scalars, and a run's configuration, out of a project's database."""
    with sqlite3.connect(path) as database:
        logged = database.execute("SELECT run_id, step, metrics FROM metrics ORDER BY id").fetchall()
        (config,) = database.execute("SELECT config FROM configs").fetchone()
    found: Scalars = {}
    for _, step, metrics in logged:
        for tag, value in json.loads(metrics).items():
            found.setdefault(tag, {})[step] = value
    return {name for name, _, _ in logged}, found, json.loads(config)


def wandb_records(path: Path):
    """The records of an offline file: LevelDB's log format after a header of 7 bytes, with protocol buffers in it."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, part = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        if place + 7 + size > len(data):  # still being written
            return
        part += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(part)
            part = b""


def finished(path: Path) -> list:
    """The records of a file once its last one is there: wandb's own process may write it after the run's end."""
    for _ in range(200):
        found = list(wandb_records(path))
        if found and found[-1].WhichOneof("record_type") == "exit":
            break
        time.sleep(0.1)
    return found


def wandb_rows(folder: Path) -> Shown:
    """The same out of offline files."""
    identities, found, config = set(), {}, {}
    for path in sorted(folder.glob("offline-run-*/*.wandb")):
        for record in finished(path):
            if record.run.run_id:
                identities.add(record.run.run_id)
                config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for tag, value in row.items():
                if not tag.startswith("_") and tag != "step":
                    found.setdefault(tag, {})[row["step"]] = value
    return identities, found, config


def axes(folder: Path) -> dict[str, str]:
    """By what wandb draws each figure: what it calls the step, by the figures' names."""
    records = [record.metric for path in folder.glob("offline-run-*/*.wandb") for record in finished(path)]
    return {one.glob_name or one.name: one.step_metric for one in records if one.glob_name or one.name}


def run_and_resume(tiny_run, package: str) -> Scalars:
    """A tracked run that loses its last checkpoint, so that steps are taken and sent twice; what its records say."""
    pytest.importorskip(package, reason="an optional package of trackers")
    tracked = (f"tracking=[{package}]", "train.eval_every=2", *SHORT)
    assert tiny_run("train.max_steps=4", *tracked)[0] == 0
    shutil.rmtree(RUN / "checkpoints" / "step-00000004")
    code, out, err = tiny_run("train.max_steps=5", "--resume", "auto", *tracked)
    assert code == 0, err
    assert f"tracking:  {package}\n" in out
    wanted = recorded_scalars()
    assert wanted["train/loss"].keys() == {1, 2, 3, 4, 5}
    return wanted


def assert_scalars(found: Scalars, wanted: Scalars) -> None:
    assert found.keys() == wanted.keys()
    for tag, values in wanted.items():
        assert found[tag] == pytest.approx(values), tag


def test_tensorboard_shows_a_resumed_run_as_one(tiny_run):
    wanted = run_and_resume(tiny_run, "tensorboard")
    found, text = board(RUN / "tensorboard")
    assert_scalars(found, wanted)
    assert "    max_steps: 5" in text
    assert "int8 weights" in text, "the plan"


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_a_tracker_goes_on_in_one_run_and_takes_the_records_later_too(tiny_run, trackers_offline, monkeypatch, package):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    wanted = run_and_resume(tiny_run, package)
    trackio = package == "trackio"
    live = trackio_rows(trackers_offline / "qgalore.db") if trackio else wandb_rows(RUN / "wandb")
    identities, found, config = live
    assert len(identities) == 1
    assert_scalars(found, wanted)
    assert config["train"]["lr"] == 0.01
    assert trackio or axes(RUN / "wandb")["*"] == "step", "rows of steps that are taken again would be dropped"
    assert config["plan"]["resident"] == json.loads((RUN / "plan.json").read_text())["resident"]

    count = trackers.send(records.read_run(RUN), package, "later")
    assert count == sum(map(len, wanted.values()))
    later = trackio_rows(trackers_offline / "later.db") if trackio else wandb_rows(Path("wandb"))
    assert_scalars(later[1], wanted)
    assert later[2]["train"]["lr"] == 0.01
    written = [path for place in (Path(), trackers_offline) for path in place.rglob("*") if path.is_file()]
    assert not [path for path in written if KEY.encode() in path.read_bytes()], "the key is in a file"


class Fake:
    """A tracker that keeps what it is told; ``failing`` names the call that raises."""

    def __init__(self, failing="", stop_at=None):
        self.calls, self.failing, self.stop_at = [], failing, stop_at

    def __call__(self, asked):
        return self

    def _told(self, name, *what):
        self.calls.append((name, *what))
        if name == self.failing:
            raise RuntimeError("refused by https://me:geheim@example.org/?token=abc123\nsaid the service")

    def begin(self, run):
        self._told("begin", run.name, run.step, run.resumed)

    def send(self, step, scalars):
        if step == self.stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        self._told("send", step, *sorted(tag for tag in scalars if tag in ("train/loss", "held_out/eval_loss")))

    def go_back(self, step):
        self._told("go_back", step)

    def end(self, code):
        self._told("end", code)


def put(monkeypatch, tracker):
    monkeypatch.setitem(live.TRACKERS, "wandb", tracker)
    return tracker


@pytest.mark.parametrize("failing", ["begin", "send", "end"])
def test_a_tracker_that_fails_stops_nothing_and_is_left_alone(tiny_run, monkeypatch, failing):
    fake = put(monkeypatch, Fake(failing))
    code, out, err = tiny_run("tracking=[wandb]", "train.max_steps=2", *SHORT)
    assert code == 0, err
    assert [call[0] for call in fake.calls].count(failing) == 1
    assert fake.calls[-1][0] == failing
    (line,) = [line for line in out.splitlines() if line.startswith("warning: tracking by wandb ends here: ")]
    assert "RuntimeError: refused by https://[secret]@example.org/?[secret] said the service" in line
    assert "qgalore convergence runs/tiny --wandb PROJECT" in line
    assert [row["step"] for row in rows(RUN / "metrics.jsonl") if "loss" in row] == [1, 2]


def test_a_signal_and_a_hopeless_run_end_the_trackers_with_their_codes(tiny_run, monkeypatch):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        fake = put(monkeypatch, Fake(stop_at=2))
        assert tiny_run("tracking=[wandb]", *FEW)[0] == 130
        assert fake.calls[0] == ("begin", "tiny", 0, False)
        assert [call[1] for call in fake.calls if "train/loss" in call] == [1, 2]
        assert fake.calls[-1] == ("end", 130)
    finally:
        signal.signal(signal.SIGINT, before)
    fake = put(monkeypatch, Fake())
    Poison(monkeypatch, {2, 3}, float("nan"))  # steps 4 and 5
    code, _, err = tiny_run("tracking=[wandb]", "--resume", "auto", *FEW)
    assert code == 4, err
    assert fake.calls[0] == ("begin", "tiny", 2, True)
    assert [call[1] for call in fake.calls if call[0] == "send" and "train/loss" in call] == [3]
    assert fake.calls[-2:] == [("send", 5), ("end", 4)], "the row of the last skipped step comes too"


def test_steps_that_are_taken_again_are_announced(tiny_run, monkeypatch):
    """Where tensors step before all gradients are there, a bad gradient sends the run back to a checkpoint."""
    fake = put(monkeypatch, Fake())
    PoisonedGradient(monkeypatch, 4)
    code, _, err = tiny_run("tracking=[wandb]", "train.save_every=2", BATCH_MAJOR, *SHORT)
    assert code == 0, err
    steps = [call[:2] for call in fake.calls if call[0] == "go_back" or "train/loss" in call]
    assert steps == [("send", 1), ("send", 2), ("send", 3), ("go_back", 2), ("send", 3), ("send", 5), ("send", 6)]


def test_the_board_forgets_steps_that_are_taken_again(tmp_path):
    tracker = live.make(["tensorboard"])["tensorboard"]
    tracker.begin(live.Description("run", tmp_path, settings={"lr": 1}))
    for step in (1, 2, 3, 4):
        tracker.send(step, {"train/loss": step})
    tracker.go_back(2)
    tracker.send(3, {"train/loss": 30})
    tracker.end(0)
    assert board(tmp_path / "tensorboard")[0] == {"train/loss": {1: 1, 2: 2, 3: 30}}


def test_trackio_says_if_it_could_not_write(tmp_path, trackers_offline, monkeypatch):
    """Its threads swallow errors. If it ever tells them otherwise, this test does."""
    import trackio

    tracker = live.make(["trackio"])["trackio"]
    tracker.begin(live.Description("run", tmp_path))
    monkeypatch.setattr(trackio.run.SQLiteStorage, "bulk_log", staticmethod(_no_space))
    tracker.send(1, {"train/loss": 1.0})
    with pytest.warns(UserWarning, match="No space left"), pytest.raises(RuntimeError, match="could not be written"):
        tracker.end(0)


def _no_space(*_, **__):
    raise OSError(28, "No space left on device")


def test_a_package_that_is_not_there_is_missed_before_the_run_has_a_folder(tiny_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    code, out, err = tiny_run("tracking=[tensorboard, wandb]")
    assert code == 2
    assert "tracking: wandb needs the package wandb" in err
    assert "pip install wandb or leave it out" in err
    assert not Path("runs").exists()
    assert out == ""


def test_each_tracker_is_named_once(tiny_run):
    code, _, err = tiny_run("tracking=[wandb, wandb]", "--plan")
    assert code == 2
    assert "tracking is ['wandb', 'wandb']; it must be a list of different values" in err


@pytest.mark.parametrize("content", ["", "{}", '{"identity": "../x"}', "[1]"])
def test_a_damaged_identity_is_said_with_its_remedy(tmp_path, content):
    (tmp_path / "tracking.json").write_text(content)
    with pytest.raises(ConfigError, match=r"tracking\.json .*Delete it"):
        tracking.kept_identity(tmp_path)
    (tmp_path / "tracking.json").unlink()
    assert tracking.kept_identity(tmp_path) is None
