"""Steps of the walk are steps of ordinary accumulation, bit for bit: for all architectures, rules and batches."""

import pytest
import torch
import zoo

import qgalore
from qgalore.combinations import RULES as FACTS
from qgalore.lowrank.rules import RULES
from qgalore.steps import api
from qgalore.steps.trial import try_walk

STEPS, COUNTS = 20, (1, 8)
WITH_RANK = {"apollo": {"rank": 4}}


def make(name, rule):
    """A converted model with its optimizer and loss. A tied weight keeps still: its two parts would add up in another
    order, to which test_walk.py holds their gradients."""
    model, loss = zoo.build(name)
    stored = FACTS[rule].uses_basis
    qgalore.convert(model, rank=4 if stored else None)
    if name in zoo.TIED:
        model.get_output_embeddings().weight.requires_grad_(False)
    options = {"lr": 0.01, "update_proj_gap": 6, "weight_decay": 0.01, "stepping": "manual", "rule": rule}
    return model, qgalore.optimizer(model, **options, **WITH_RANK.get(rule, {})), loss


def compare(name, rule, count, steps=None):
    """Twenty steps; with eight micro-batches as many as it takes to refresh a basis twice."""
    steps = steps or (8 if count == 8 else STEPS)
    (model, optimizer, loss), (other, accumulating, _) = (make(name, rule) for _ in range(2))
    batches = zoo.batches(name, count * steps)
    layout = try_walk(other, batches[0], loss).layout
    accumulating.accumulate_in_fp32(count > 1)
    for step in range(steps):
        part = batches[step * count : (step + 1) * count]
        first = part[0]  # all of the step's 50 targets are counted there
        options = {"targets": lambda batch, first=first: 50 if batch is first else 0, "graphs_of_last": step % 3}
        taken = api.step(model, optimizer, part, loss=loss, seed=5, **options)
        losses = zoo.batch_major(other, list(layout.blocks), part, loss, step)
        accumulating.step()
        assert taken.loss == pytest.approx(sum(losses), rel=1e-6)
        assert taken.grad_norm == pytest.approx(accumulating.grad_norm, rel=1e-5)
    found, expected = zoo.everything(model, optimizer), zoo.everything(other, accumulating)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    assert optimizer.refresh_counts() == accumulating.refresh_counts()
    if optimizer.refresh_counts()[0]:
        assert any(event["step"] >= 6 for event in optimizer.events), "the test wants refreshes after the first"


@pytest.mark.slow
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", zoo.NAMES)
def test_every_architecture(name, count):
    compare(name, "galore", count)


@pytest.mark.slow
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("rule", RULES)
def test_every_rule(rule, count):
    compare("llama", rule, count)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "gemma3", "bert classifier"])
@pytest.mark.parametrize("rule", RULES)
def test_rules_on_other_architectures(name, rule):
    compare(name, rule, 2, steps=8)
