"""How many blocks keep their graphs from the forward pass: as many as the plan has room for, and the run does so."""

import re
from functools import partial

import pytest
import torch

from qgalore import config
from qgalore.errors import DoesNotFitError
from qgalore.memory.plan import Plan
from qgalore.training import assemble, fit
from qgalore.training.model import Vocabulary
from qgalore.training.paper import plan_for
from qgalore.training.proposals import changed

KEY = "train.activation_checkpointing"
DEEP = ("model.overrides={num_hidden_layers: 4, vocab_size: 512}", "data.sequence_length=256")
WORDS = Vocabulary(512, None, None)


def resolved(*overrides: str):
    return config.resolve(config.load("quickstart.yaml", [*DEEP, *overrides]), "cuda", True)


def settled(settings, budget: int):
    within = changed(settings, {"memory.budget": f"{budget / 2**20:.3f}MiB"})
    chosen, found = fit.settle(within, WORDS, torch.device("cuda"))
    return chosen.train.activation_checkpointing, found


def planned(settings, choice) -> int:
    return plan_for(changed(settings, {KEY: choice}), WORDS, "cuda").total


@pytest.mark.slow
def test_as_many_keep_their_graphs_as_there_is_room_for(capsys):
    """One more would leave less than the margin."""
    settings = resolved("train.grad_accumulation=5")
    totals = {number: planned(settings, number) for number in range(1, 4)}
    assert list(totals.values()) == sorted(totals.values())
    for wanted in (1, 3):
        budget = int(totals[wanted] * fit.MARGIN) + (1 << 12)
        choice, found = settled(settings, budget)
        out = capsys.readouterr().out
        assert choice is not True
        assert choice == max(number for number, total in totals.items() if total * fit.MARGIN <= budget)
        assert found.total == totals[choice]
        assert f"auto → {KEY}={choice}" in out
        assert re.search(
            rf"the last ({choice} blocks keep their graphs|block keeps its graph) from the forward pass", out
        )


@pytest.mark.slow
def test_the_ends_are_all_graphs_no_graphs_and_inputs_on_the_host(capsys):
    settings = resolved("train.grad_accumulation=5")
    whole, none, away = (planned(settings, choice) for choice in (False, True, "offload"))
    assert whole > none > away
    assert settled(settings, int(whole * fit.MARGIN) + (1 << 12))[0] is False
    assert settled(settings, none + (1 << 12))[0] is True
    assert settled(settings, away + (1 << 12))[0] == "offload"
    out = capsys.readouterr().out
    assert "the blocks' inputs of 5 micro-batches wait in host memory" in out
    with pytest.raises(DoesNotFitError):
        settled(settings, away - (1 << 20))


LINES = {
    "flat at first": lambda number: max(1000, 400 + 90 * number),
    "straight": lambda number: 1000 + 90 * number,
    "ever steeper": lambda number: 1000 + 7 * number**2,
    "flat": lambda number: 1000,
}


def rehearsed(peak, asked: list[int], number: int):
    """A choice of ``number`` graphs with its plan, which is noted."""
    asked.append(number)
    return number, Plan({"": peak(number)}, {}, {})


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("most", [0, 1, 31, 32])
def test_a_convex_line_is_climbed_to_the_last_number_that_fits(line, most):
    """Peaks that are flat at first and rise later, which one chord alone would underrate, and others."""
    peak = LINES[line]
    for room in (1000, 1035, 1089, 1090, 1300, 1900, 3200, 3880, 9000):
        asked: list[int] = []
        made = partial(rehearsed, peak, asked)
        found, _ = fit._with_some_graphs(made, (0, Plan({"": peak(0)}, {}, {})), most, room)
        assert found == max(n for n in range(most + 1) if peak(n) <= room)
        assert len(asked) == len(set(asked))
        if line == "straight":
            assert len(asked) <= 2  # each is a rehearsal of seconds


def test_all_blocks_keep_their_graphs_where_a_large_model_has_room_for_them():
    """A model that fills more than half of the budget by itself is not tried with all graphs first."""
    large = "model.overrides={num_hidden_layers: 2, vocab_size: 524288, tie_word_embeddings: false}"
    few = ("data.sequence_length=2", "train.micro_batch_size=1", "train.optimizer=adamw")
    settings = resolved(large, *few)
    whole = planned(settings, False)
    choice, found = settled(settings, budget := int(whole * fit.MARGIN) + (1 << 12))
    assert choice is False
    assert found.total == whole
    assert sum(found.resident.values()) > budget // 2


@pytest.mark.slow
def test_the_host_total_is_the_last_line_and_has_a_budget_of_its_own():
    settings = resolved("train.grad_accumulation=8", f"{KEY}=offload", "memory.budget=64GiB")
    found = plan_for(settings, WORDS, "cuda")
    lines = str(found).splitlines()
    assert lines[-1].split()[:2] == ["host", "total"]
    assert [line.split()[0] for line in lines].count("total") == 1
    inputs = 5 * 8 * 16 * 256 * 256 * 2  # blocks and one, micro-batches, rows, tokens, width, bf16
    assert inputs <= found.host_total < 1.5 * inputs
    within = changed(settings, {"memory.host_budget": f"{found.host_total / 2**20 + 0.01:.2f}MiB"})
    fit.settle(within, WORDS, torch.device("cuda"))
    beyond = changed(settings, {"memory.host_budget": f"{found.host_total / 2**20 - 0.1:.2f}MiB"})
    with pytest.raises(DoesNotFitError, match=r"of host memory, and there are .* \(memory\.host_budget\)"):
        fit.settle(beyond, WORDS, torch.device("cuda"))


def test_a_run_keeps_as_many_graphs_as_its_plan_says(tiny_run, monkeypatch, capfd):
    """The choice is made anew at every start, and changes no bit."""
    made = config.load("tiny.yaml", ["model.overrides.num_hidden_layers=4", "train.max_steps=2", "run.name=some"])
    monkeypatch.setattr(fit, "decide", lambda config, *rest, **more: _one(config, *rest, **more))
    run = assemble.build(made, None)
    assert run.config.train.activation_checkpointing == 1
    assert run.loop.order.kept.graphs.last == 1
    assert "the last block keeps its graph" in capfd.readouterr().out


def _one(settings, vocabulary, device, budget, loss=None, processes=1):
    chosen = changed(settings, {KEY: 1})
    return chosen, plan_for(chosen, vocabulary, device, loss, processes)
