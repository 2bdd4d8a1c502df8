"""Whole runs of ``train.py`` in several processes."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from helpers import assert_same
from jobs import codes, live, rows, state
from processes import run_in
from safetensors.torch import load_file

from qgalore.training import assemble

STEPS = 50
ORDERS = ("batch_major", "layer_major")
both_orders = pytest.mark.parametrize("order", ORDERS)


@both_orders
def test_a_nan_in_one_process_skips_the_step_in_all(folder, order):
    short = ["train.max_steps=4", "train.eval_every=4", "train.save_every=2", "train.eval_batches=2"]
    short.append(f"train.order={order}")
    found = run_in(2, live, str(folder), short, (1, 2, "nan"))
    assert codes(found) == {0}, found
    losses = rows(folder / "runs/tiny", "lr")
    assert [row.get("skipped") for row in losses] == [None, None, "rank 1: the loss is nan in step 3", None]
    assert len(rows(folder / "runs/tiny", "eval_loss")) == 2  # before the first step and after the last
    # what two processes wrote is an ordinary checkpoint
    model, _ = assemble.restore_model(folder / "runs/tiny/checkpoints/step-00000004")
    saved = state(folder / "runs/tiny", 4)
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items() if name in saved)
    one = run_in(1, live, str(folder), [*short, "train.max_steps=6", "--resume", "auto"])
    assert one == [(0, "")]
    assert [row["step"] for row in rows(folder / "runs/tiny", "lr")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("order", "what"), [("batch_major", "bug"), ("layer_major", "bug"), ("layer_major", "bug going back")]
)
def test_a_bug_in_one_process_ends_all(folder, order, what):
    """Going back, in the lowest block: the sums of blocks above it are under way then."""
    with pytest.raises(AssertionError, match="KeyError: 'a bug'") as raised:
        run_in(2, live, str(folder), ["run.name=bug", f"train.order={order}"], (1, 1, what))
    assert "rank 1" in str(raised.value)


def test_micro_batches_that_cannot_be_shared_are_refused(folder):
    found = run_in(2, live, str(folder), ["train.grad_accumulation=3"])
    assert found[0][0] == found[1] == 2  # the second leaves with the code alone
    assert "set a multiple of 2" in found[0][1]


@pytest.mark.slow
@pytest.mark.parametrize(("order", "clip"), [("batch_major", "0.5"), ("layer_major", "0"), ("layer_major", "0.5")])
def test_the_same_run_in_one_two_and_four_processes(folder, clip, order):
    """Losses differ by the order of fp32 sums, 2⁻²⁴ a sum, which 50 steps of AdamW may amplify a hundredfold; with int8
    weights a rounding that falls the other way would be a larger, random difference, which exact sums exclude."""
    plain = ["method=galore", "lowrank.policy=fixed", f"train.clip_grad_norm={clip}", "train.optimizer=adamw"]
    plain.append(f"train.order={order}")
    for size in (1, 2, 4):
        assert codes(run_in(size, live, str(folder), [*plain, f"run.name=p{size}"])) == {0}
    one = rows(folder / "runs/p1", "lr")
    for size in (2, 4):
        other = rows(folder / f"runs/p{size}", "lr")
        assert [row["tokens"] for row in one] == [row["tokens"] for row in other]
        for a, b in zip(one, other, strict=True):
            assert abs(a["loss"] - b["loss"]) <= (1e-6 if a["step"] <= 3 else 1e-4) * a["loss"], (size, a["step"])
            assert abs(a["grad_norm"] - b["grad_norm"]) <= 1e-2 * a["grad_norm"], (size, a["step"])


@pytest.mark.slow
@both_orders
@pytest.mark.parametrize(
    "method",
    [
        ["lowrank.rule=fira", "train.full_gradients=keep"],
        ["lowrank.policy=energy", "lowrank.proj_type=full"],
        ["method=lora"],
        ["method=adamw"],
    ],
    ids=["fira", "energy", "lora", "adamw"],
)
def test_other_methods_take_the_same_steps(folder, method, order):
    short = ["train.max_steps=4", "train.grad_accumulation=2", "train.eval_batches=3", f"train.order={order}", *method]
    for size in (1, 2):
        assert codes(run_in(size, live, str(folder), [*short, f"run.name=p{size}"])) == {0}
    one, two = (rows(folder / run, "lr") for run in ("runs/p1", "runs/p2"))
    for a, b in zip(one, two, strict=True):  # later steps hang on single roundings, see above
        assert abs(a["loss"] - b["loss"]) <= (1e-6 if a["step"] < 3 else 1e-3) * a["loss"], a["step"]
    evaluated = [rows(folder / run, "eval_loss")[-1]["eval_loss"] for run in ("runs/p1", "runs/p2")]
    assert abs(evaluated[0] - evaluated[1]) <= 1e-3 * evaluated[0]


# An expert of few tokens has a gradient of low rank: with larger bases losses part sooner by the order of fp32 sums.
SMALL_MIXTURE = ["model.config=mixtral_quickstart", "lowrank.rank=4", "train.max_steps=5", "train.grad_accumulation=2"]
SPLIT = ["parallel=shard"]


FUSED = ["method=galore", "model.overrides.router_aux_loss_coef=0.5"]  # fused in two, if batch-major


@pytest.mark.parametrize(
    ("order", "options"),
    [
        ("layer_major", FUSED),
        pytest.param("batch_major", FUSED, marks=pytest.mark.slow),
        pytest.param("batch_major", ["method=galore", "train.clip_grad_norm=0.5"], marks=pytest.mark.slow),
        pytest.param("layer_major", ["method=galore", "train.clip_grad_norm=0.5"], marks=pytest.mark.slow),
        pytest.param("layer_major", ["method=galore", "train.activation_checkpointing=true"], marks=pytest.mark.slow),
        pytest.param("layer_major", ["method=galore", *SPLIT], marks=pytest.mark.slow),
        pytest.param("layer_major", ["method=lora"], marks=pytest.mark.slow),
        pytest.param("layer_major", ["method=galore", "lowrank.rule=fira"], marks=pytest.mark.slow),
        pytest.param("layer_major", ["lowrank.rank=auto", "lowrank.max_rank=32"], marks=pytest.mark.slow),
    ],
    ids=["fused", "fused-batch", "clipped-batch", "clipped", "checkpointed", "shard", "lora", "fira", "auto"],
)
def test_a_mixture_takes_the_same_steps_in_two_processes(folder, order, options):
    """Losses as for a dense model; and the same experts wait. With int8 weights single roundings fall the other way."""
    mixture = [*SMALL_MIXTURE, "train.eval_batches=3", f"train.order={order}"]
    for size, name in ((1, "one"), (2, "two")):
        assert codes(run_in(size, live, str(folder), [*mixture, *options, f"run.name={name}"])) == {0}
    one, two = (rows(folder / "runs" / name, "lr") for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert abs(a["loss"] - b["loss"]) <= (1e-6 if a["step"] < 3 else 1e-3) * a["loss"], a["step"]
        if a["step"] < 3:
            assert a.get("without_gradient") == b.get("without_gradient")
            assert a.get("waiting") == b.get("waiting")


@pytest.mark.slow
@both_orders
def test_a_signal_to_one_process_stops_all_after_the_same_step(folder, order):
    """Such as a cluster sends to one machine: all save and leave, and a resumed run ends like an unbroken one."""
    short = ["train.max_steps=6", "train.save_every=10", f"train.order={order}"]
    assert codes(run_in(2, live, str(folder), [*short, "run.name=cut"], (1, 3, "signal"))) == {143}
    saved = sorted(path.name for path in (folder / "runs/cut/checkpoints").glob("step-*"))
    assert saved == {"batch_major": [], "layer_major": ["step-00000000"]}[order] + ["step-00000004"]
    assert codes(run_in(2, live, str(folder), [*short, "run.name=cut", "--resume", "auto"])) == {0}
    assert codes(run_in(2, live, str(folder), [*short, "run.name=whole"])) == {0}
    assert_same(state(folder / "runs/whole", 6), state(folder / "runs/cut", 6))


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from qgalore.files.safetensors import Copied
from qgalore.steps import reducing
from qgalore.training import loop
import train
step, write = loop.Loop._step, Copied.write
def die():
    if os.environ["RANK"] == "1" and not Path("killed").exists():
        Path("killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
def dying(self):
    if self.position.step == 25 and {where!r} == "step":
        die()
    return step(self)
def half(self, path):  # one of the two files is written, beside training
    if "step-00000030" in str(path) and path.name.startswith("optimizer") and {where!r} == "save":
        die()
    return write(self, path)
def alive(self, *arguments):  # sums are under way
    if self.optimizer.step_count == 25 and self.optimizer.inside_step and {where!r} == "walk":
        die()
    return asked(self, *arguments)
asked, reducing.Steps._asked = reducing.Steps._asked, alive
loop.Loop._step, Copied.write = dying, half
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("order", "where", "how"),
    [
        ("batch_major", "step", "replicate"),
        ("layer_major", "walk", "replicate"),
        ("layer_major", "walk", "shard"),
        ("layer_major", "save", "shard"),
    ],
)
def test_a_killed_process_is_started_again_and_changes_no_bit(folder, where, how, order):
    options = [f"parallel={how}", f"train.order={order}"]
    assert codes(run_in(2, live, str(folder), [*options, "run.name=whole"])) == {0}
    (folder / "killed.py").write_text(KILLED.format(root=str(ROOT), where=where))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--max-restarts=1"]
    command = [*torchrun, "killed.py", "--config", "tiny.yaml", *options, "run.name=cut", "--resume", "auto"]
    made = subprocess.run(command, cwd=folder, timeout=600, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert (folder / "killed").exists()
    assert "step-00000020, after step 20" in made.stdout
    assert_same(state(folder / "runs/whole", STEPS), state(folder / "runs/cut", STEPS))
    assert [row["loss"] for row in rows(folder / "runs/whole", "lr")] == [
        row["loss"] for row in rows(folder / "runs/cut", "lr")
    ]


@pytest.mark.slow
def test_two_machines_that_meet_over_a_port_take_the_steps_of_one(folder):
    """Two of torchrun's agents, each with a process that counts as the first of its machine."""
    short = ["train.max_steps=8", "train.order=layer_major"]
    assert codes(run_in(2, live, str(folder), [*short, "run.name=one"])) == {0}
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    meeting = ["--rdzv_id=mine", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", *meeting]
    command = [*torchrun, str(ROOT / "train.py"), "--config", "tiny.yaml", *short, "run.name=two"]
    machines = [subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in "ab"]
    told = [machine.communicate(timeout=300)[0].decode() for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], told
    assert sum("done: " in text for text in told) == 1
    assert_same(state(folder / "runs/one", 8), state(folder / "runs/two", 8))


@pytest.mark.slow
def test_saved_by_four_continued_by_two_exported_by_one(folder):
    """With integer-like sums excluded here, two continue bit for bit what two would have; four only up to fp32."""
    first = ["run.name=r", "train.max_steps=20", "train.lr_schedule=constant"]
    assert codes(run_in(4, live, str(folder), first)) == {0}
    assert codes(run_in(2, live, str(folder), [*first, "train.max_steps=30", "--resume", "auto"])) == {0}
    done = folder / "runs/r/checkpoints/step-00000030"
    command = [sys.executable, str(ROOT / "tools/export.py"), str(done), "--format", "hf", "--out", str(folder / "hf")]
    subprocess.run(command, check=True, timeout=300, capture_output=True)
    exported = load_file(Path(folder / "hf/model.safetensors"))
    model, _ = assemble.restore_model(done)
    layer = model.model.layers[0].mlp.up_proj
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(exported[name], layer.dense_weight().to(exported[name].dtype))


@pytest.mark.slow
def test_several_processes_draw_from_a_mixture_what_one_draws(folder):
    (folder / "tales.txt").write_text("A hen met a fox, and the fox met a dog. " * 60)
    (folder / "sums.txt").write_text(" ".join(f"{n} and {n} is {2 * n}." for n in range(200)))
    mixed = ["data.train=[{path: tales.txt, weight: 3}, sums.txt]", "data.vocab_size=300", "data.valid_fraction=0.2"]
    mixed += ["train.max_steps=4", "train.eval_every=2", "train.save_every=2", "train.order=layer_major"]
    for count in (1, 2):
        assert codes(run_in(count, live, str(folder), [*mixed, f"run.name=p{count}"])) == {0}
    for key in ("loss", "eval_loss/sums"):
        alone, shared = ([row[key] for row in rows(folder / run, key)] for run in ("runs/p1", "runs/p2"))
        assert len(alone) > 2
        assert shared == pytest.approx(alone, rel=1e-3)
    last = rows(folder / "runs/p2", "drawn/tales")[-1]
    assert (last["drawn/tales"], last["drawn/sums"]) == (12, 4)
