"""The memory plan against the memory that is taken."""

import pytest
import torch

from qgalore import build, config
from qgalore.loop import Loop, Position

GIB = 2**30
WIDE = "model.overrides={hidden_size: 256, intermediate_size: 704, num_hidden_layers: 3, tie_word_embeddings: %s}"
SHAPES = {
    "plain": (WIDE % "true", "train.activation_checkpointing=false"),
    "checkpointed": (WIDE % "true", "train.activation_checkpointing=true"),
    "untied": (WIDE % "false", "train.activation_checkpointing=true", "data.vocab_size=2000"),
    "int8 embeddings": (WIDE % "true", "train.activation_checkpointing=true", "lowrank.embeddings=int8"),
    "untied int8 embeddings": (WIDE % "false", "train.activation_checkpointing=false", "lowrank.embeddings=int8"),
    "deferred": (WIDE % "true", "train.activation_checkpointing=true", "train.stepping=deferred"),
    "joined documents": (WIDE % "false", "train.activation_checkpointing=false", "data.document_attention=joined"),
    "left bases": (WIDE % "true", "train.activation_checkpointing=true", "lowrank.proj_type=left"),
    "bf16": (WIDE % "true", "train.activation_checkpointing=true", "model.dtype=bfloat16"),
    "AdamW": (WIDE % "true", "method=adamw"),
    "galore8bit": (WIDE % "true", "train.activation_checkpointing=true", "method=galore8bit"),
}
COMMON = ("train.max_steps=9", "train.micro_batch_size=8", "data.sequence_length=64", "lowrank.rank=64")
REFRESHES = ("lowrank.update_proj_gap=1", "lowrank.stagger=false")


def storages(run: build.Run) -> int:
    """Bytes of everything that a built run keeps between steps."""
    optimizer = run.loop["optimizer"]
    kept = [*run.model.parameters(), *run.model.buffers()]
    for slot in optimizer.slots:
        kept += slot.tensors().values()
        for part in slot.parts:
            kept += [part.leaf, *part.state().values()]
    found = {value.untyped_storage()._cdata: value.untyped_storage() for value in kept if torch.is_tensor(value)}
    return sum(storage.nbytes() for storage in found.values())


def measured_rise(work) -> int:
    """The most bytes that PyTorch's CPU allocator held during ``work`` beyond what it held before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("name", SHAPES)
def test_the_plan_is_what_is_taken(name, tiny_run):
    """Resident bytes exactly, the peak of steps with refreshes within 5 %."""
    overrides = [*COMMON, *REFRESHES, "run.name=planned", *SHAPES[name]]
    run = build.build(config.load("tiny.yaml", overrides), None)
    loop = Loop(**run.loop, position=Position(**run.position))
    run.model.train()
    loop._step()
    resident = storages(run)
    assert sum(run.planned.resident.values()) == resident

    def two_steps():
        loop._step()
        loop._step()

    peak = resident + measured_rise(two_steps)
    assert run.planned.tensors == pytest.approx(peak, rel=0.05)
