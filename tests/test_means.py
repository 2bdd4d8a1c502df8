"""A mean over targets is one, however they fall into batches: of a step's loss, and of an evaluation."""

import json
from pathlib import Path

import pytest
import torch

from qgalore.evaluation.loss import evaluate

WORDS = ("red", "green", "blue", "black", "white", "brown", "pink", "grey", "gold", "plum", "teal", "rust", "sand")
TURNS = [[f"Say {w} {n} times.", " ".join([w] * n)] for w in WORDS for n in (1, 2, 40)]
ROWS = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in TURNS * 2]


def losses(run, name, micro, accumulation):
    """(targets, loss, gradient norm) of one step's batch, split so."""
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data = ("data.task=instruct", "data.train=rows.jsonl", "data.vocab_size=300", "data.sequence_length=64")
    split = (
        f"train.micro_batch_size={micro}",
        f"train.grad_accumulation={accumulation}",
        "lowrank.rank=full",
    )
    code, _, err = run(*data, *split, f"run.name={name}", "train.max_steps=1", "export.formats=[]")
    assert code == 0, err
    rows = [json.loads(line) for line in Path(f"runs/{name}/metrics.jsonl").read_text().splitlines()]
    row = next(row for row in rows if "loss" in row)
    return row["tokens"], row["loss"], row["grad_norm"]


def test_a_step_weighs_targets_and_not_micro_batches(tiny_run):
    """Answers of 1 to 40 words, in one batch of 8, or one by one: the same loss and gradient, to fp32. A mean of the
    micro-batches' means would be off by parts in a hundred: the long answers are easier or harder."""
    whole, parts = losses(tiny_run, "whole", 8, 1), losses(tiny_run, "parts", 1, 8)
    assert parts[0] == whole[0]
    assert parts[1] == pytest.approx(whole[1], rel=1e-5)
    assert parts[2] == pytest.approx(whole[2], rel=1e-3)


@pytest.mark.parametrize("sizes", [(1, 30), (30, 1, 5), (7, 0, 2)])
def test_an_evaluation_weighs_targets_and_not_batches(sizes):
    """Each target costs what it says; a batch without targets neither counts nor is run."""
    values = torch.arange(float(sum(sizes))).square()
    batches = [lambda part=part: {"x": part} for part in values.split(list(sizes))]

    def summed(model, batch):
        assert len(batch["x"])
        assert not model.training
        return batch["x"].sum()

    model = torch.nn.Dropout().train()
    found = evaluate(model, batches, summed, lambda batch: len(batch["x"]), torch.device("cpu"))
    assert found.loss == pytest.approx(float(values.mean()), rel=1e-6)
    assert found.tokens == sum(sizes)
    assert model.training
