"""What streaming costs on paper is what it costs: bytes to the byte, and the time that hides the copies."""

import re
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import qgalore
from qgalore import config
from qgalore.errors import ConfigError, DoesNotFitError
from qgalore.lowrank.factory import trained_tensors
from qgalore.lowrank.subspace.refresh import RefreshOptions
from qgalore.memory import machine, streamed, timeline
from qgalore.memory.plan import human
from qgalore.models.loss import summed_loss
from qgalore.steps import api
from qgalore.steps.blocks import Layout
from qgalore.steps.streaming.stream import Stream
from qgalore.steps.trial import try_walk
from qgalore.training import fit
from qgalore.training.model import Vocabulary
from qgalore.training.paper import plan_for
from qgalore.training.parts import Stepping
from qgalore.training.proposals import candidates, changed
from qgalore.training.stepping import LayerMajor

SHAPE = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
RANK, BLOCKS = 32, 5


def llama(device: str, rule: str):
    torch.manual_seed(3)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=BLOCKS)).to(torch.bfloat16).train()
    qgalore.convert(model, rank=RANK if rule == "galore" else None)
    return model


def planned(rule: str, slots: int, state: bool) -> streamed.Streamed:
    """As the plan has it: everything on the meta device."""
    from qgalore.lowrank.inner.checked import make_factory
    from qgalore.lowrank.rules import RuleOptions
    from qgalore.lowrank.tensors.attaching import attach
    from qgalore.memory.resident import make_states
    from qgalore.memory.stand_ins import Adam8bitShapes

    model = llama("meta", rule)
    lazy = {"cos_threshold": 0.4, "gamma_proj": 2.0, "queue_size": 5, "max_gap": 100}
    how = {"update_proj_gap": 100, "stagger": True, "lazy": lazy, "find": RefreshOptions()}
    tensors = trained_tensors(model, **how, rule=rule, of_rule=RuleOptions())
    attach(tensors, Adam8bitShapes if rule == "galore" else make_factory("adamw", 0.1, {}), 1 << 20)
    make_states(tensors)
    return streamed.on_paper(model, list(model.model.layers), tensors, slots, state)


@pytest.mark.parametrize(("rule", "slots", "state"), [("galore", 2, True), ("galore", 3, False), ("muon", 2, True)])
def test_planned_bytes_are_those_of_a_step(rule, slots, state):
    model = llama("cpu", rule)
    inner = "adamw8bit" if rule == "galore" else "adamw"
    optimizer = qgalore.optimizer(model, lr=0.01, stepping="manual", rule=rule, update_proj_gap=100, inner=inner)
    stream = Stream(model, list(model.model.layers), torch.device("cpu"), slots=slots)
    stream.adopt(optimizer, state=state)
    found = planned(rule, slots, state)
    assert [record.nbytes for record in found.records] == [record.nbytes for record in stream.records]
    assert (found.host_bytes, found.slot_bytes) == (stream.host_bytes, stream.slot_bytes)
    ids = torch.arange(32).view(2, 16)
    for _ in range(2):  # the first step finds all bases, and a trial comes before it
        before = dict(stream.copied)
        api.step(model, optimizer, [{"input_ids": ids, "labels": ids}], loss=summed_loss, turns=stream)
    assert stream.copied["in"] - before["in"] == found.bytes_in()
    assert stream.copied["out"] - before["out"] == found.bytes_out()


@pytest.mark.parametrize("slots", [2, 3])
def test_planned_bytes_are_those_of_a_clipped_step(slots):
    """Blocks without a new basis go back once, when the norm of all gradients is known, and come twice with all."""
    model = llama("cpu", "galore")
    optimizer = qgalore.optimizer(model, lr=0.01, stepping="manual", update_proj_gap=100)
    stream = Stream(model, list(model.model.layers), torch.device("cpu"), slots=slots, waits=True)
    stream.adopt(optimizer, state=True)
    ids = torch.arange(32).view(2, 16)
    batch = {"input_ids": ids, "labels": ids}
    layout = try_walk(model, batch, summed_loss).layout
    how = Stepping(lr_at=lambda step: 0.01, seed=0, max_steps=2, micro_batch_size=2, clip_grad_norm=0.1)
    order = LayerMajor(model, optimizer, how, layout, turns=stream)
    for step in range(2):
        before = dict(stream.copied)
        order.take(step, [0], [batch], lambda batch: summed_loss(model, batch), lambda loss: None)
    found = replace(planned("galore", slots, True), clips=True)
    assert stream.copied["in"] - before["in"] == found.bytes_in()
    assert stream.copied["out"] - before["out"] == found.bytes_out()
    assert "Clipping takes all blocks through once more" in found.line(100)


@pytest.mark.parametrize("slots", [2, 3])
def test_copies_hide_from_the_tokens_that_the_plan_names(slots):
    """The engine's own order on a clock: nothing waits from there on, and something does below."""
    found, link, speed = planned("galore", slots, True), 1e9, 1e12
    enough = found.tokens_to_hide(link, speed)
    walked = timeline.of_tokens(found, enough + 1, link, speed)
    computing = sum(bar.end - bar.start for bar in walked.bars if bar.lane == "compute")
    assert walked.waited <= found.slot_bytes / link, "for what the last block lacks after the forward direction"
    assert timeline.of_tokens(found, enough // 2, link, speed).waited > 0.2 * computing / 2
    moved = sum((bar.end - bar.start) * link for bar in walked.bars if bar.lane != "compute")
    assert moved == pytest.approx(found.bytes_in() + found.bytes_out())


def test_a_model_without_known_blocks_is_refused():
    with pytest.raises(ConfigError, match=r"memory.stream needs a model whose blocks .* Set memory.stream=none"):
        streamed.blocks_to_stream(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("layout", "found"),
    [(None, "none"), (Layout("elsewhere", nn.ModuleList([nn.Linear(1, 1)] * 3)), "the 3 of elsewhere")],
)
def test_a_model_that_is_walked_otherwise_is_refused(layout, found):
    model = llama("meta", "galore")
    with pytest.raises(ConfigError, match=rf"a walk goes through {found}, of the {BLOCKS} that are marked.*=none"):
        streamed.check_blocks(model, layout, streamed.blocks_to_stream(model))


DEEP = ("model.overrides={num_hidden_layers: 4, vocab_size: 512}", "data.sequence_length=128", "lowrank.rank=64")
WORDS = Vocabulary(512, None, None)
CHOICES = ("none", "weights", "all")


def deep(*overrides: str):
    given = [*DEEP, "train.activation_checkpointing=offload", *overrides]
    return config.resolve(config.load("quickstart.yaml", given), "cuda", True)


def refusal(settings, device="cuda") -> str:
    with pytest.raises(DoesNotFitError) as error:
        fit.settle(settings, WORDS, torch.device(device))
    return str(error.value)


def taken(settings, **changes) -> str:
    """What a plan with ``changes`` takes, as the advice says it."""
    found = plan_for(
        changed(settings, {key.replace("__", "."): value for key, value in changes.items()}), WORDS, "cuda"
    )
    return f"{human(found.total)} and {human(found.host_total)} of host memory"


def sized(settings, **limits: int):
    return changed(settings, {f"memory.{key}": f"{value / 2**20:.3f}MiB" for key, value in limits.items()})


@pytest.mark.slow
def test_what_does_not_fit_on_the_device_may_wait_on_the_host():
    """Both choices, with the bytes that each then takes; and of these what the host has room for."""
    plans = {choice: plan_for(changed(deep(), {"memory.stream": choice}), WORDS, "cuda") for choice in CHOICES}
    none, weights, everything = plans.values()
    budget, room = (none.total + weights.total) // 2, (weights.host_total + everything.host_total) // 2
    said = refusal(sized(deep(), budget=budget))
    for choice in ("weights", "all"):
        found = plans[choice]
        figures = f"{human(found.total)} and {human(found.host_total)} of host memory"
        assert f"\n  memory.stream={choice}  → {figures}" in said
    said = refusal(sized(deep(), budget=budget, host_budget=room))
    assert "memory.stream=weights  →" in said
    assert "memory.stream=all" not in said


@pytest.mark.slow
def test_moments_follow_where_streamed_weights_are_not_enough():
    settings = deep("memory.stream=weights")
    said = refusal(sized(settings, budget=plan_for(settings, WORDS, "cuda").total - 4096))
    assert f"\n  memory.stream=all  → {taken(settings, memory__stream='all')}" in said


@pytest.mark.parametrize(
    ("asked", "more"),
    [("2", {"train.activation_checkpointing": "auto"}), ("true", {}), ("offload", {}), ("auto", {})],
)
def test_a_block_that_keeps_its_graph_keeps_it_no_longer_where_it_is_streamed(asked, more):
    tried = list(candidates(deep(f"train.activation_checkpointing={asked}"), "cuda", can_stream=True))
    assert {"memory.stream": "weights", **more} in tried
    assert {"memory.stream": "all", **more} in tried
    assert not any("memory.stream" in changes for changes in candidates(deep(), "cuda"))
    assert not any("memory.stream" in changes for changes in candidates(deep("memory.stream=all"), "cuda", True))


@pytest.mark.slow
@pytest.mark.parametrize("change", ["method=lora", "train.order=batch_major"])
def test_nothing_is_proposed_that_cannot_be_streamed(change):
    settings = deep("train.activation_checkpointing=true", change)
    total = plan_for(settings, WORDS, "cuda").total
    assert "memory.stream" not in refusal(sized(settings, budget=total - 4096))


@pytest.mark.slow
def test_what_does_not_fit_on_the_host_may_stay_on_the_device():
    settings = deep("memory.stream=all", "memory.budget=64GiB")
    said = refusal(sized(settings, host_budget=plan_for(settings, WORDS, "cuda").host_total - 4096))
    assert re.search(
        r"of host memory, and there are .* \(memory\.host_budget\)\. These changes would make it fit:", said
    )
    for choice in ("weights", "none"):
        assert f"\n  memory.stream={choice}  → {taken(settings, memory__stream=choice)}" in said
    assert f"\n  lowrank.rank=32  → {taken(settings, lowrank__rank=32)}" in said


@pytest.mark.slow
def test_a_lower_rank_is_proposed_where_the_device_has_no_room_either():
    settings = deep("memory.stream=all")
    whole, less = (plan_for(changed(settings, {"lowrank.rank": rank}), WORDS, "cuda") for rank in (64, 32))
    assert less.host_total < whole.host_total
    said = refusal(sized(settings, budget=whole.total + 4096, host_budget=(less.host_total + whole.host_total) // 2))
    assert f"\n  lowrank.rank=32  → {taken(settings, lowrank__rank=32)}" in said
    assert "memory.stream=none" not in said


@pytest.mark.slow
def test_blocks_inputs_that_find_no_room_on_the_host_may_stay_on_the_device():
    settings = deep("memory.budget=64GiB", "train.grad_accumulation=8")
    said = refusal(changed(settings, {"memory.host_budget": "1MiB"}))
    assert "\n  train.activation_checkpointing=true  → " in said


def test_a_machine_without_the_memory_is_named_before_anything_is_built(monkeypatch):
    """On a CPU both pools lie in this machine's memory."""
    monkeypatch.setattr(machine, "available", lambda device: 1 << 20)
    small = (*DEEP, "lowrank.rank=1", "memory.stream=all", "device=cpu", "memory.budget=64GiB")
    settings = config.resolve(config.load("quickstart.yaml", list(small)), "cpu", False)
    said = refusal(settings, "cpu")
    assert re.search(r"of this machine's memory for streamed blocks and the device .* 1\.0 MiB are free\. Lower", said)
