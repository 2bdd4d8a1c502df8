"""The memory plan against the memory that is taken."""

import importlib
import json

import pytest
import torch
from transformers import BertConfig

from qgalore import config
from qgalore.data.tokenizer import train_tokenizer
from qgalore.errors import DoesNotFitError
from qgalore.memory.resident import resident
from qgalore.training import assemble
from qgalore.training.model import Vocabulary
from qgalore.training.paper import on_paper
from qgalore.training.proposals import candidates, changed

planning = importlib.import_module("qgalore.training.fit")  # assemble.plan is the function

GIB = 2**30
WIDE = "model.overrides={hidden_size: 256, intermediate_size: 704, num_hidden_layers: 3, tie_word_embeddings: %s}"
BATCH = "train.order=batch_major"
KEPT = (BATCH, "train.stepping=deferred", "train.full_gradients=keep")
INT8 = "lowrank.embeddings=int8"
INT8_PRODUCTS = ("model.compute=int8", "lowrank.group_size=row")
ACCUMULATED = "train.grad_accumulation=2"
FOUR, EIGHT = "train.grad_accumulation=4", "train.grad_accumulation=8"
CHECKPOINTED = "train.activation_checkpointing=true"
EXPERTS = ("model.config=mixtral_quickstart", "model.overrides={num_hidden_layers: 2}")
AUTO = ("lowrank.rank=auto", "lowrank.max_rank=64")
SHAPES = {
    "plain": (WIDE % "true", "train.activation_checkpointing=false"),
    "checkpointed": (WIDE % "true", "train.activation_checkpointing=true"),
    "untied": (WIDE % "false", "train.activation_checkpointing=true", "data.vocab_size=2000"),
    "int8 embeddings": (WIDE % "true", "train.activation_checkpointing=true", "lowrank.embeddings=int8"),
    "untied int8 embeddings": (WIDE % "false", "train.activation_checkpointing=false", "lowrank.embeddings=int8"),
    "batch-major": (WIDE % "true", CHECKPOINTED, BATCH),
    "batch-major, graphs": (WIDE % "false", "train.activation_checkpointing=false", BATCH),
    "deferred": (WIDE % "true", CHECKPOINTED, BATCH, "train.stepping=deferred"),
    "joined documents": (WIDE % "false", "train.activation_checkpointing=false", "data.document_attention=joined"),
    "left bases": (WIDE % "true", "train.activation_checkpointing=true", "lowrank.proj_type=left"),
    "bf16": (WIDE % "true", "train.activation_checkpointing=true", "model.dtype=bfloat16"),
    "AdamW": (WIDE % "true", "method=adamw"),
    "apollo": (WIDE % "true", "train.activation_checkpointing=true", "lowrank.rule=apollo"),
    "scale, int8 embeddings": (WIDE % "true", "train.activation_checkpointing=true", "lowrank.rule=scale", INT8),
    "muon": (WIDE % "true", "train.activation_checkpointing=true", "lowrank.rule=muon"),
    "muon 8-bit, accumulating": (WIDE % "true", "lowrank.rule=muon", "lowrank.momentum=8bit", ACCUMULATED, *KEPT),
    "muon, experts": (*EXPERTS, "train.activation_checkpointing=true", "lowrank.rule=muon"),
    "muon, bf16": (WIDE % "true", "lowrank.rule=muon", "model.dtype=bfloat16", "lowrank.momentum=bf16"),
    "sinkgd": (WIDE % "true", "train.activation_checkpointing=true", "lowrank.rule=sinkgd"),
    "fira, deferred": (WIDE % "true", "train.activation_checkpointing=true", "lowrank.rule=fira", *KEPT),
    "accumulating, batch-major": (WIDE % "true", "train.activation_checkpointing=false", ACCUMULATED, BATCH),
    "scale, accumulating": (WIDE % "true", "lowrank.rule=scale", "train.grad_accumulation=3", *KEPT),
    "LoRA": (WIDE % "true", "train.activation_checkpointing=true", "method=lora"),
    "experts": (*EXPERTS, "train.activation_checkpointing=true"),
    "experts, AdamW": (*EXPERTS, "method=adamw"),
    "4-bit moments": (WIDE % "true", "train.activation_checkpointing=true", "train.optimizer=adamw4bit"),
    "nearest, rederived": (WIDE % "true", "lowrank.weight_rounding=nearest", "lowrank.weight_scales=rederived"),
    "auto ranks": (WIDE % "true", "train.activation_checkpointing=true", *AUTO, "lowrank.energy=1"),
    "galore8bit": (WIDE % "true", "train.activation_checkpointing=true", "method=galore8bit"),
    "4": (WIDE % "false", CHECKPOINTED, FOUR),
    "8": (WIDE % "true", CHECKPOINTED, EIGHT),
    "4, graphs kept": (WIDE % "false", "train.activation_checkpointing=false", FOUR),
    "8, graphs of one": (WIDE % "false", "train.activation_checkpointing=1", EIGHT),
    "4, fira": (WIDE % "false", CHECKPOINTED, "lowrank.rule=fira", FOUR),
    "8, fira": (WIDE % "true", CHECKPOINTED, "lowrank.rule=fira", EIGHT),
    "4, muon": (WIDE % "true", CHECKPOINTED, "lowrank.rule=muon", FOUR),
    "8, muon, graphs of two": (
        WIDE % "true",
        "train.activation_checkpointing=2",
        "lowrank.rule=muon",
        EIGHT,
    ),
    "8, bf16": (WIDE % "true", CHECKPOINTED, "model.dtype=bfloat16", EIGHT),
    "4, int8 embeddings": (WIDE % "false", CHECKPOINTED, INT8, FOUR),
    "4, experts": (*EXPERTS, CHECKPOINTED, FOUR),
    "8, clipped": (WIDE % "true", CHECKPOINTED, "train.clip_grad_norm=1", EIGHT),
    "int8 products": (WIDE % "true", "train.activation_checkpointing=true", *INT8_PRODUCTS),
}
COMMON = ("train.max_steps=9", "train.micro_batch_size=8", "data.sequence_length=64", "lowrank.rank=64")
REFRESHES = ("lowrank.update_proj_gap=1", "lowrank.stagger=false")


def storages(run: assemble.Run) -> int:
    """Bytes of everything that a built run keeps between steps."""
    optimizer = run.loop.optimizer
    kept = [*run.model.parameters(), *run.model.buffers()]
    for slot in optimizer.tensors:
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


QUICK = (
    "checkpointed",
    "untied int8 embeddings",
    "deferred",
    "left bases",
    "bf16",
    "scale, accumulating",
    "LoRA",
    "4, fira",
    "8, muon, graphs of two",
)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SHAPES]
)
def test_the_plan_is_what_is_taken(name, tiny_run):
    """Resident bytes exactly, the peak of steps with refreshes within 5 %."""
    check_plan(config.load("tiny.yaml", [*COMMON, *REFRESHES, "run.name=planned", *SHAPES[name]]))


def check_plan(settings: config.Config) -> None:
    run = assemble.build(settings, None)
    loop = run.loop
    run.model.train()
    loop._step()
    resident = storages(run)
    assert sum(run.planned.resident.values()) == resident

    def two_steps():
        loop._step()
        loop._step()

    peak = resident + measured_rise(two_steps)
    assert run.planned.tensors == pytest.approx(peak, rel=0.05)


@pytest.mark.parametrize("order", [("train.order=layer_major",), (BATCH,), (BATCH, "train.stepping=deferred")])
def test_the_plan_has_room_for_every_rank(order, tiny_run):
    """Ranks that share half of what all would take at their limit, and move in every step, stay within the plan."""
    one_layer = "model.overrides={hidden_size: 256, intermediate_size: 704, num_hidden_layers: 1}"
    checkpointing = "train.activation_checkpointing=true"
    ranks = (*AUTO, "lowrank.mean_rank=32", "lowrank.energy=0.8", "train.lr=0.05", *order)
    overrides = [*COMMON, *REFRESHES, "run.name=moving", one_layer, checkpointing, *ranks]
    run = assemble.build(config.load("tiny.yaml", overrides), None)
    loop = run.loop
    run.model.train()
    seen = set()
    for _ in range(4):
        before = storages(run)
        assert before + measured_rise(loop._step) <= 1.05 * run.planned.tensors  # as exact as a peak is planned
        assert storages(run) <= sum(run.planned.resident.values())
        seen.add(tuple(event["rank"] for event in loop.course.drain_events()))
    assert len(seen) > 1
    assert max(map(max, seen)) > 32 > min(map(min, seen))


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_the_plan_of_an_encoder_that_drops_attention(checkpointing, tiny_run, tmp_path):
    """Scores are half of what it keeps: a CPU has no fused kernel for them then. Each row is as long as is allowed."""
    words = ["red blue green " * 30, "sun moon sea " * 30]
    rows = [{"sentence": text, "label": text[:3]} for text in words * 16]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = train_tokenizer(words, vocab_size=300, report=lambda line: None)
    tokenizer.save_pretrained(tmp_path / "encoder")
    heads = {"hidden_size": 64, "num_attention_heads": 8, "intermediate_size": 128, "num_hidden_layers": 2}
    BertConfig(**heads, vocab_size=len(tokenizer)).save_pretrained(tmp_path / "encoder")
    data = "data={task: classify, train: rows.jsonl, valid: rows.jsonl, tokenizer: encoder, sequence_length: 64}"
    model = ("model={config: encoder}", f"train.activation_checkpointing={checkpointing}")
    check_plan(config.load("tiny.yaml", [*COMMON[:2], *REFRESHES, data, *model]))


LARGE = {
    ("llama7b_16gb.yaml",): 10.7,
    ("llama7b_16gb.yaml", "lowrank.proj_type=reverse_std"): 9.8,
    ("llama7b_16gb.yaml", "lowrank.rank=256"): 8.0,
    ("llama7b_16gb.yaml", "lowrank.rank=256", "lowrank.embeddings=int8"): 8.0,
    ("llama7b_16gb_muon.yaml",): 10.3,
    ("llama7b_12gb.yaml",): 9.0,
    ("llama13b_16gb.yaml",): 14.0,
    ("llama3_8b_16gb.yaml",): 12.2,
    ("qwen2.5_7b_16gb.yaml",): 11.9,
    ("mistral7b_16gb.yaml",): 11.8,
}


def resolved(*arguments: str, device="cuda"):
    settings = config.resolve(config.load(arguments[0], list(arguments[1:])), device, True)
    return settings, Vocabulary(settings.model.overrides.get("vocab_size", 1), None, None)


@pytest.mark.parametrize("arguments", LARGE, ids=" ".join)
def test_resident_bytes_of_the_large_configurations(arguments):
    """Counted over tensors on the meta device. The limits are what the project promises."""
    settings, vocabulary = resolved(*arguments)
    settings = changed(settings, {"train.activation_checkpointing": True})
    model, optimizer = on_paper(settings, vocabulary)
    sizes = resident(model, optimizer.tensors)
    assert sum(sizes.values()) <= LARGE[arguments] * GIB
    layers = sizes["int8 weights"] / GIB
    assert 5.5 < layers < 12.5  # none was forgotten


def test_the_plan_needs_no_gpu_and_prints_every_category(capsys):
    assemble.plan(config.load("llama7b_16gb.yaml", ["model.overrides.num_hidden_layers=8"]))
    out = capsys.readouterr().out
    assert "planned for a CUDA device of 15.3GiB; there is none here" in out or torch.cuda.is_available()
    for word in ("int8 weights", "weight scales", "bases", "moments", "activations", "CUDA context", "total"):
        assert word in out
    assert "auto → train.activation_checkpointing=false" in out  # 8 blocks have room for their graphs
    assert "host total" in out


def test_what_cannot_fit_is_refused_with_what_would(capsys):
    """Each proposal, tried, does fit, and is the total that was promised."""
    small = ("model.overrides.num_hidden_layers=4", "train.activation_checkpointing=offload")
    arguments = ("llama7b_16gb.yaml", *small, "memory.budget=3.2GiB")
    with pytest.raises(
        DoesNotFitError, match=r"the plan needs .* GiB, and there are 3\.20 GiB \(memory\.budget\)"
    ) as error:
        assemble.plan(config.load(arguments[0], list(arguments[1:])))
    lines = str(error.value).splitlines()[1:]
    assert len(lines) == 3
    for line in lines:
        changes, promised = line.strip().split("  → ")
        assemble.plan(config.load(arguments[0], [*arguments[1:], *changes.split()]))
        here, _, on_host = promised.removesuffix(" of host memory").partition(" and ")
        out = capsys.readouterr().out
        assert f"planned peak {here} of" in out
        assert not on_host or f"host total {on_host}" in " ".join(out.split())


def test_proposals_for_automatic_ranks_lower_what_they_share():
    settings, _ = resolved("llama7b_16gb.yaml", "lowrank.rank=auto", "lowrank.max_rank=32", "train.max_steps=9")
    tried = list(candidates(settings, "cuda"))
    assert {"lowrank.mean_rank": 16} in tried
    assert not any("lowrank.rank" in changes for changes in tried)
    assert all(changes.get("lowrank.mean_rank", 8) >= 8 for changes in tried)


def test_a_run_that_cannot_fit_does_not_start(tiny_run):
    code, out, err = tiny_run("memory.budget=1MiB")
    assert code == 3
    assert "planned peak" in out
    assert "the plan needs" in err
    assert "loss" not in out


@pytest.mark.parametrize("budget", ["much", "-3GiB", "16", "0GiB"])
def test_a_budget_that_is_no_size_is_refused(tiny_run, budget):
    code, _, err = tiny_run(f"memory.budget={budget}")
    assert code == 2
    assert "it must be a size with its unit, such as 15.5GiB" in err


def test_an_optimizer_that_cannot_step_on_paper_is_planned_as_adamw(tiny_run):
    extra = ("train.optimizer=torch.optim.Adafactor", "train.optimizer_options={eps: [null, 1.0]}")
    code, out, err = tiny_run(*extra, "lowrank.moments=keep", "train.max_steps=2")
    assert code == 0, err
    assert "planned peak" in out
    assert out.count("Adafactor cannot be tried on tensors without values") == 1
    assert "counts the state of AdamW in its place" in out
