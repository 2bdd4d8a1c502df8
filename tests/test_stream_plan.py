"""What streaming costs on paper is what it costs: bytes to the byte, and the time that hides the copies."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import qgalore
from qgalore.errors import ConfigError
from qgalore.lowrank.factory import trained_tensors
from qgalore.lowrank.subspace.refresh import RefreshOptions
from qgalore.memory import streamed, timeline
from qgalore.models.loss import summed_loss
from qgalore.steps import api
from qgalore.steps.streaming.stream import Stream

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
