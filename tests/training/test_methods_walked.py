"""Everything that a configuration can ask for gives the same bits in layer-major steps as in batch-major ones."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import assert_same, final_state, rows
from labelled import write_table
from torch._dynamo.utils import counters

from qgalore.models import compiling
from qgalore.training import model as building

COMMON = ("export.formats=[]", "sample.max_new_tokens=0", "train.keep_last=9", "train.save_every=1")
COMMON += ("train.lr_schedule=constant", "train.full_gradients=keep")
UNTIED = "model.overrides.tie_word_embeddings=false"
INT8 = ("model.compute=int8", "lowrank.group_size=row")
MIXTURE = ("model.config=mixtral_quickstart", "model.overrides.num_local_experts=4")
CASES = {
    "tied": ("model.overrides.tie_word_embeddings=true",),
    "int8 products": INT8,
    "lora": ("method=lora",),
    "adamw": ("method=adamw",),
    "adamw8bit": ("method=adamw8bit",),
    "galore": ("method=galore",),
    "galore8bit": ("method=galore8bit",),
    "int8 embeddings": ("lowrank.embeddings=int8",),
    "4-bit moments": ("train.optimizer=adamw4bit",),
    "another optimizer": ("train.optimizer=torch.optim.SGD", "lowrank.moments=reset"),
    "automatic ranks": ("lowrank.rank=auto", "lowrank.max_rank=32"),
    "full rank": ("lowrank.rank=full",),
    "two bases": ("lowrank.proj_type=full",),
    "bf16": ("model.dtype=bfloat16",),
    "a mixture": MIXTURE,
    "a mixture of Qwen's": ("model.config=qwen3_moe_quickstart",),
    "some layers": ("lowrank.include=['*.mlp.*']",),
    "documents joined": ("data.document_attention=joined",),
}
RULES = ("fira", "apollo", "apollo_mini", "scale", "muon", "sinkgd")
CASES["limited updates"] = ("lowrank.rule=apollo", "train.clip_update_rms=0.2")
CASES |= {f"rule {rule}": (f"lowrank.rule={rule}",) for rule in RULES}
QUICK = [("int8 products", 2), ("a mixture", 1), ("lora", 2)]
TWICE = [name for name in CASES if name not in ("tied", "bf16")]  # sums of two that are taken in another order, in bf16


def losses(run):
    return [row["loss"] for row in rows(f"runs/{run}/metrics.jsonl") if "lr" in row]


def both(run, *arguments, many=False):
    """Run in both orders. With ``many`` micro-batches from a common checkpoint on: batch-major steps find the very
    first bases in the first of them alone."""
    code, _, err = run(*COMMON, *arguments, "train.order=batch_major", "run.name=plain")
    assert code == 0, err
    start = ()
    if many:
        shutil.copytree("runs/plain", "runs/walked")
        start = ("--resume", "runs/walked/checkpoints/step-00000001")
    code, out, err = run(*COMMON, *arguments, "train.order=layer_major", "run.name=walked", *start)
    assert code == 0, err
    assert "layer-major: the model is walked through" in out
    return out


def same(step=6):
    assert losses("walked") == losses("plain")
    assert_same(final_state("runs/walked", step), final_state("runs/plain", step))


@pytest.mark.parametrize(
    ("name", "count"),
    [
        pytest.param(name, count, marks=() if (name, count) in QUICK else pytest.mark.slow)
        for count in (1, 2)
        for name in (CASES if count == 1 else TWICE)
    ],
)
def test_the_bits_are_those_of_batch_major_steps(tiny_run, name, count):
    split = () if count == 1 else (f"train.grad_accumulation={count}", "train.micro_batch_size=2")
    both(tiny_run, UNTIED, *CASES[name], *split, many=count > 1)
    same()
    if "rule" in name or name.startswith(("adamw", "lora", "full", "limited")):
        return
    found = [json.loads(line)["step"] for line in Path("runs/walked/subspace.jsonl").read_text().splitlines()]
    assert max(found) >= 3, "the test wants a refresh"


NUMBERS = ("data.train=numbers.tsv", "data.valid=numbers.tsv", "data.label_type=number")


@pytest.mark.parametrize(
    ("body", "labels"),
    [
        ("encoder", ()),
        pytest.param("decoder", (), marks=pytest.mark.slow),
        pytest.param("encoder", NUMBERS, marks=pytest.mark.slow),
    ],
)
def test_classifiers_and_regression(classify_run, body, labels):
    """Without dropout, which a walk seeds for each block."""
    write_table(Path("numbers.tsv"), 100, 3, number=True)
    fields = json.loads(Path(body, "config.json").read_text())
    fields |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    Path(body, "config.json").write_text(json.dumps(fields))
    split = ("train.grad_accumulation=2", "train.micro_batch_size=8")
    both(classify_run, f"model.path={body}", *labels, *split, many=True)
    same(8)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["false", "true"])
def test_one_graph_serves_both_passes_of_all_micro_batches_and_blocks(tiny_run, monkeypatch, how):
    """Traced, not rewritten: the same bits."""

    def traced(model, leaf):
        return compiling.compile_blocks(model, leaf, "aot_eager")

    torch.compiler.reset()
    counters.clear()
    monkeypatch.setattr(building, "compile_blocks", traced)
    many = ("train.grad_accumulation=2", "train.micro_batch_size=2", f"train.activation_checkpointing={how}")
    try:
        both(tiny_run, UNTIED, "model.compile=blocks", *many, many=True)
        assert counters["stats"]["unique_graphs"] <= 4  # one in each run, beside that of the compiler's trial
    finally:
        torch.compiler.reset()
    same()
