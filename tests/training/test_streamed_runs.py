"""Runs whose blocks live in host memory: the same bits as resident ones, wherever they stop and go on."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from helpers import assert_same, final_state, rows

ALL = "memory.stream=all"
ROOT = Path(__file__).resolve().parents[2]


def losses(run: str) -> list:
    return [(row.get("loss"), row.get("eval_loss"), row.get("grad_norm")) for row in rows(f"{run}/metrics.jsonl")]


INTEGERS = ("model.compute=int8", "lowrank.group_size=row")


@pytest.mark.parametrize("products", [(), pytest.param(INTEGERS, marks=pytest.mark.slow)], ids=["floats", "integers"])
def test_a_streamed_run_is_a_resident_one(tiny_run, products):
    code, _, err = tiny_run("run.name=resident", "train.grad_accumulation=2", *products)
    assert code == 0, err
    code, out, err = tiny_run("run.name=streamed", "train.grad_accumulation=2", ALL, "memory.slots=3", *products)
    assert code == 0, err
    assert "stream:    2 blocks in" in out
    assert "host total" in out
    assert_same(final_state("runs/streamed"), final_state("runs/resident"))
    assert losses("runs/streamed") == losses("runs/resident")
    exports = [Path(f"runs/{name}/export/hf/model.safetensors").read_bytes() for name in ("streamed", "resident")]
    assert exports[0] == exports[1]


@pytest.mark.slow
def test_one_compiled_graph_serves_the_slots_of_all_blocks(tiny_run):
    from torch._dynamo.utils import counters

    compiled = ("model.compile=blocks", "model.overrides.num_hidden_layers=4", "export.formats=[]")
    graphs = []
    for name, stream in (("resident", "none"), ("streamed", "all")):
        torch.compiler.reset()
        counters.clear()
        code, _, err = tiny_run(f"run.name={name}", f"memory.stream={stream}", *compiled)
        assert code == 0, err
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] > 0
    assert_same(final_state("runs/streamed"), final_state("runs/resident"))
    assert losses("runs/streamed") == losses("runs/resident")


CLIPPED = ("train.clip_grad_norm=0.5", "train.grad_accumulation=2", "train.max_steps=4", "export.formats=[]")


@pytest.mark.parametrize(
    ("choice", "more"),
    [("weights", ()), pytest.param("all", ("memory.slots=3", "lowrank.moments=reset"), marks=pytest.mark.slow)],
)
def test_clipping_waits_for_all_gradients_and_then_streams_again(tiny_run, choice, more):
    """Refreshes fall into these steps, and every norm is above the limit."""
    short = (*CLIPPED, "model.overrides.num_hidden_layers=4", "lowrank.update_proj_gap=2", *more)
    assert tiny_run("run.name=resident", *short)[0] == 0
    code, _, err = tiny_run("run.name=streamed", f"memory.stream={choice}", *short)
    assert code == 0, err
    assert_same(final_state("runs/streamed", 4), final_state("runs/resident", 4))
    assert losses("runs/streamed") == losses("runs/resident")
    assert all(row["grad_norm"] > 0.5 for row in rows("runs/streamed/metrics.jsonl") if "grad_norm" in row)


def test_a_norm_of_whole_gradients_is_refused_for_streamed_blocks(tiny_run):
    whole = ("lowrank.rule=muon", "train.full_gradients=keep", "train.clip_grad_norm=1")
    code, _, err = tiny_run(ALL, *whole)
    assert code == 2
    assert "train.clip_grad_norm: 1 does not go with memory.stream: all; use train.clip_update_rms" in err


@pytest.mark.slow
def test_streaming_may_begin_and_end_when_a_run_is_resumed(tiny_run):
    for steps, stream in ((2, "all"), (4, "none"), (6, "weights")):
        code, _, err = tiny_run(
            "run.name=parts", f"train.max_steps={steps}", "train.lr_schedule=constant", "export.formats=[]",
            f"memory.stream={stream}", *(["--resume", "auto"] if steps > 2 else []),
        )  # fmt: skip
        assert code == 0, err
    assert tiny_run("run.name=flat", "train.lr_schedule=constant", "export.formats=[]")[0] == 0
    assert_same(final_state("runs/parts"), final_state("runs/flat"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("train.order=batch_major", "train.order: batch_major"),
        ("method=lora", "method: lora"),
        ("lowrank.rank=auto", "lowrank.rank: auto"),
        ("train.activation_checkpointing=false", "train.activation_checkpointing: false"),
        ("train.activation_checkpointing=1", "train.activation_checkpointing: 1"),
        ("parallel=shard", "parallel: shard"),
    ],
)
def test_what_cannot_be_streamed_is_refused_at_once(tiny_run, change, named):
    code, _, err = tiny_run(ALL, change)
    assert code == 2
    assert f"{named} does not go with memory.stream: all" in err
    assert not Path("runs").exists()


# More blocks than there are slots, or streaming would save nothing.
SIX = ("model.overrides.num_hidden_layers=6", "model.dtype=float32", "train.activation_checkpointing=true")


def needs() -> dict[str, int]:
    """Bytes that a tiny run of six blocks is planned to take, by ``memory.stream``."""
    from qgalore import config
    from qgalore.training.data import build_tokenizer, given_tokenizer
    from qgalore.training.model import Vocabulary
    from qgalore.training.paper import plan_for

    found = {}
    for stream in ("none", "weights", "all"):
        made = config.resolve(config.load("tiny.yaml", [*SIX, f"memory.stream={stream}"]), "cpu", True)
        vocabulary = Vocabulary.of(build_tokenizer(made, given_tokenizer(made)))
        found[stream] = plan_for(made, vocabulary, "cpu").total
    return found


@pytest.mark.slow
def test_auto_streams_no_more_than_the_budget_asks_for(tiny_run, monkeypatch):
    from qgalore.memory import machine

    monkeypatch.setattr(machine, "resident_set", lambda: 0)  # it grows between two plans
    short = ("train.max_steps=2", "export.formats=[]", "sample.max_new_tokens=0")
    assert tiny_run("run.name=resident", *SIX, *short)[0] == 0
    none, weights, everything = needs().values()
    assert none > weights > everything

    def within(budget: float, *more: str) -> str:
        asked = (*SIX, "memory.stream=auto", f"memory.budget={budget / 2**10:.3f}KiB", *more)
        code, out, err = tiny_run(*asked)
        assert code == 0, err
        return out

    assert "auto → memory.stream=none\n" in within(none + 1e3, "--plan")
    assert "auto → memory.stream=all\n" in within((weights + everything) / 2, "--plan")
    out = within((none + weights) / 2, "run.name=auto", *short)
    assert "auto → memory.stream=weights\n" in out
    assert "stream:    6 blocks in" in out
    assert_same(final_state("runs/auto", 2), final_state("runs/resident", 2))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("method=lora", "method: lora does not go with memory.stream: weights"),
        ("train.order=batch_major", "train.order: batch_major does not go with memory.stream: weights"),
    ],
)
def test_auto_says_why_it_cannot_help(tiny_run, monkeypatch, change, why):
    from qgalore.training import fit

    monkeypatch.setattr(fit, "proposals", lambda *_: [])  # what else would fit takes long to find
    code, out, _ = tiny_run("--plan", "memory.stream=auto", "memory.budget=64KiB", change)
    assert code == 3
    assert f"memory.stream=auto cannot help: {why}" in out


def test_a_host_budget_that_is_too_small_is_refused(tiny_run):
    code, _, err = tiny_run("--plan", ALL, "memory.host_budget=0.01MiB")
    assert code == 3
    assert "host memory" in err
    assert "(memory.host_budget). These changes would make it fit:\n  memory.stream=none  →" in err


KILLED = """
    import os, sys
    import train
    from qgalore.steps.streaming import copies

    class Killing(copies.ThreadCopies):
        left = 6

        def start(self, way, target, source, span, after, what):
            if way == "out":
                Killing.left -= 1
                if Killing.left == 0:
                    self._delay = lambda: os._exit(9)  # with one half of the record written
            return super().start(way, target, source, span, after, what)

    copies.ThreadCopies = Killing
    sys.exit(train.main(["--config", "tiny.yaml", "run.name=cut", "memory.stream=all", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_a_run_killed_in_a_write_back_goes_on_from_its_checkpoint(tiny_run):
    short = ("train.save_every=2", "train.max_steps=4", "export.formats=[]", "sample.max_new_tokens=0")
    assert tiny_run("run.name=whole", *short)[0] == 0
    path = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), *short], env={**os.environ, "PYTHONPATH": path}, check=False
    )
    assert killed.returncode == 9
    code, out, err = tiny_run("run.name=cut", ALL, *short, "--resume", "auto")
    assert code == 0, err
    assert "step-00000002" in out
    assert_same(final_state("runs/cut", 4), final_state("runs/whole", 4))
