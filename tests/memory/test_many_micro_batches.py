"""Plans of layer-major steps with many micro-batches, of which a few are rehearsed."""

from functools import partial

import pytest

from qgalore import config
from qgalore.memory.meter import Meter
from qgalore.memory.rehearsal import Step
from qgalore.training import fit, paper
from qgalore.training.model import Vocabulary
from qgalore.training.proposals import changed

SMALL = (
    "model.config=llama_quickstart", "model.overrides={num_hidden_layers: 3, vocab_size: 512}",
    "data.sequence_length=64", "train.micro_batch_size=2", "lowrank.rank=32",
)  # fmt: skip


def resolved(*overrides: str, device: str = "cuda"):
    return config.resolve(config.load("quickstart.yaml", [*SMALL, *overrides]), device, True)


def planned(monkeypatch, settings, rehearsed: int, device: str = "cuda"):
    monkeypatch.setattr(paper, "Step", partial(Step, rehearsed=rehearsed))
    return paper.plan_for(settings, Vocabulary(512, None, None), device)


CASES = {
    "inputs on the device": ("train.activation_checkpointing=true",),
    "inputs on the host": ("train.activation_checkpointing=offload",),
    "all graphs": ("train.activation_checkpointing=false",),
    "some graphs": ("train.activation_checkpointing=2",),
    "fira": ("train.activation_checkpointing=true", "lowrank.rule=fira"),
    "muon": ("train.activation_checkpointing=1", "lowrank.rule=muon"),
    "clipped": ("train.activation_checkpointing=true", "train.clip_grad_norm=1"),
    "int8 embeddings": ("train.activation_checkpointing=offload", "lowrank.embeddings=int8"),
    "batch-major": ("train.activation_checkpointing=true", "train.order=batch_major"),
}


@pytest.mark.parametrize("device", ["cuda", pytest.param("cpu", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CASES)
def test_those_that_are_not_rehearsed_count_as_if_they_were(name, device, monkeypatch):
    """Exactly, in every category of the plan, and on the host; but for their losses, which are 4 bytes each."""
    settings = resolved("train.grad_accumulation=9", *CASES[name], device=device)
    short, whole = (planned(monkeypatch, settings, count, device) for count in (4, 9))
    for category, size in whole.transient.items():
        assert 0 <= size - short.transient[category] <= 5 * 4, category
    assert short.host == whole.host


def test_each_micro_batch_adds_the_inputs_of_its_blocks(monkeypatch):
    """K × rows × tokens × width in bf16 for each block that is still to come and for the gradient that goes down, and
    a micro-batch's masks and rotary tables."""
    totals = [
        planned(monkeypatch, resolved(f"train.grad_accumulation={many}", *CASES["inputs on the device"]), 4).total
        for many in (32, 33, 64)  # with fewer the peak is elsewhere
    ]
    hidden = 2 * 64 * 256 * 2
    assert 3 * hidden <= totals[1] - totals[0] < 5 * hidden
    assert totals[2] - totals[0] == 32 * (totals[1] - totals[0])


def test_inputs_on_the_host_leave_the_device_as_it_is(monkeypatch):
    settings = resolved("train.grad_accumulation=8", *CASES["inputs on the host"])
    eight = planned(monkeypatch, settings, 4)
    many = planned(monkeypatch, changed(settings, {"train.grad_accumulation": 64}), 4)
    small = 8 * 64 * 2 * 128 * 2  # tokens' positions and the like, which are not worth a copy
    assert many.total - eight.total < 56 * small
    assert many.host_total == pytest.approx(8 * eight.host_total, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("micro_batches", "stream"), [(1, "none"), (2, "weights"), (8, "weights")])
def test_the_13b_has_room_for_more_micro_batches(micro_batches, stream):
    """Whole gradients of a block in fp32 are no longer small beside it, so its blocks leave for the host's memory."""
    asked = ("model.overrides.num_hidden_layers=3", f"train.grad_accumulation={micro_batches}")
    settings = config.resolve(config.load("llama13b_16gb.yaml", asked), "cuda", True)
    limit = config.bytes_of("3.95GiB")
    chosen, found = fit.decide(settings, Vocabulary(32100, None, None), "cuda", limit)
    assert chosen.memory.stream == stream
    assert found.total <= limit


def test_a_micro_batch_that_stands_for_others_is_counted_as_often():
    import torch

    meter = Meter(set(), more=3)
    kept = []
    with meter:
        for meter.number in range(4):
            kept.append(torch.empty(1000, dtype=torch.uint8, device="meta"))
    assert meter.peak == 7 * 1000


def test_no_memory_is_forgotten_when_it_is_freed():
    import torch

    meter = Meter(set(), more=2)
    with meter:
        for meter.number in range(4):
            torch.empty(1000, dtype=torch.uint8, device="meta")
    assert meter.peak == 1000
