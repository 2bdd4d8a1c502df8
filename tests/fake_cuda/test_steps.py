"""Whole steps on a CUDA device that is not there: whatever a configuration asks for, no GPU would refuse it."""

import pytest
from pretended_device import CAPABILITY
from pretended_steps import config_of, take
from recorded import unknown_forms

SPLIT = ("train.grad_accumulation=2",)
ROW = "lowrank.group_size=row"
INT8 = ("model.compute=int8", ROW)
LIGER = ("model.elementwise=liger",)
STREAM = ("memory.stream=all",)
WEIGHTS = ("memory.stream=weights",)
CLASSIFY = ("data.task=classify", "data.valid=held_out.tsv", "data.tokenizer=folder", "model.overrides.vocab_size=512")
MIXTURE = ("model.config=mixtral_quickstart", "model.overrides.num_local_experts=4")
RULES = ("fira", "apollo", "apollo_mini", "scale", "muon", "sinkgd")
RESIDENT = ("method lora", "method adamw", "method adamw8bit")  # what cannot be streamed
METHODS = ("galore", "galore8bit", "lora", "adamw", "adamw8bit")
CASES: dict[str, tuple[str, ...]] = {"qgalore": (), "two micro-batches": SPLIT}
CASES |= {f"method {method}": (f"method={method}",) for method in METHODS}
CASES |= {f"rule {rule}": (f"lowrank.rule={rule}",) for rule in RULES}
CASES |= {f"momentum {kind}": ("lowrank.rule=muon", f"lowrank.momentum={kind}") for kind in ("8bit", "bf16", "fp32")}
CASES |= {f"basis {kind}": (f"lowrank.basis_format={kind}",) for kind in ("nf4", "bf16", "fp32")}
CASES |= {f"{name}, streamed": (*CASES[name], *STREAM) for name in list(CASES) if name not in RESIDENT}
CASES |= {
    "dense weights": ("lowrank.weight_format=none",),
    "row groups": (ROW,),
    "groups of 64": ("lowrank.group_size=64",),
    "int8 products": INT8,
    "int8 products, two micro-batches": (*INT8, *SPLIT),
    "int8 products, a rule": (*INT8, "lowrank.rule=muon"),
    "int8 products, streamed": (*INT8, *STREAM),
    "int8 embeddings": ("lowrank.embeddings=int8",),
    "4-bit moments": ("train.optimizer=adamw4bit",),
    "another optimizer": ("train.optimizer=torch.optim.SGD", "lowrank.moments=reset"),
    "moments kept": ("lowrank.moments=keep",),
    "automatic ranks": ("lowrank.rank=auto", "lowrank.max_rank=48"),
    "full rank": ("lowrank.rank=full",),
    "two bases": ("lowrank.proj_type=full",),
    "exact bases": ("lowrank.projector=exact",),
    "rounded to the nearest": ("lowrank.weight_rounding=nearest",),
    "scales derived anew": ("lowrank.weight_scales=rederived",),
    "fp32": ("model.dtype=float32",),
    "fp32, a rule": ("model.dtype=float32", "lowrank.rule=fira"),
    "tied": ("model.overrides.tie_word_embeddings=true",),
    "a mixture": MIXTURE,
    "a mixture, streamed": (*MIXTURE, *STREAM),
    "a mixture, a rule": (*MIXTURE, "lowrank.rule=muon"),
    "documents joined": ("data.document_attention=joined",),
    "clipped": ("train.clip_grad_norm=1",),
    "updates limited": ("lowrank.rule=apollo", "train.clip_update_rms=0.2"),
    "decayed": ("train.weight_decay=0.1",),
    "batch-major": ("train.order=batch_major",),
    "batch-major, two micro-batches": ("train.order=batch_major", *SPLIT),
    "batch-major, offloaded": ("train.order=batch_major", "train.activation_checkpointing=offload"),
    "offloaded": ("train.activation_checkpointing=offload", *SPLIT),
    "all graphs kept": ("train.activation_checkpointing=false",),
    "one graph kept": ("train.activation_checkpointing=1", *SPLIT),
    "weights streamed": WEIGHTS,
    "weights streamed, a rule": (*WEIGHTS, "lowrank.rule=muon"),
    "weights streamed, two micro-batches": (*WEIGHTS, *SPLIT, "memory.slots=3"),
    "streamed, offloaded": (*STREAM, "train.activation_checkpointing=offload"),
    "liger": LIGER,
    "liger, streamed": (*LIGER, *STREAM),
    "liger, int8 products, two micro-batches": (*LIGER, *INT8, *SPLIT),
    "liger, batch-major, offloaded": (*LIGER, "train.order=batch_major", "train.activation_checkpointing=offload"),
    "liger, method lora": (*LIGER, "method=lora"),
    "classes": CLASSIFY,
    "classes, streamed": (*CLASSIFY, *STREAM),
    "classes, lora": (*CLASSIFY, "method=lora"),
    "numbers": (*CLASSIFY, "data.label_type=number"),
}
CASES |= {f"policy {p}": (f"lowrank.policy={p}",) for p in ("first_vector", "signed_cosine", "energy", "fixed")}
QUICK = ("liger, streamed", "classes, lora")
WITHOUT_BASES = ("lora", "adamw", "full rank", "rule", "muon", "momentum", "limited", "energy")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CASES])
def test_no_gpu_would_refuse_a_step(tmp_path, name):
    if "liger" in name:
        pytest.importorskip("liger_kernel")
    taken = take(config_of(tmp_path, *CASES[name]), resumed=True)
    for account in (*taken.steps, taken.evaluation):
        assert ("_rms_norm_forward_kernel" in account.kernels) == ("liger" in name)
    assert taken.device.launched or "method" in name or "fp32" in name, "the test wants kernels"
    assert not unknown_forms(taken.device.launched, CAPABILITY[0] * 10 + CAPABILITY[1])
    if "int8 products" in name:
        assert all("_int8_product_kernel" in account.kernels for account in taken.steps)
    if not any(word in name for word in WITHOUT_BASES):
        assert taken.refreshes > 14, "the test wants a refresh after the first ones"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qgalore", "int8 products", "rule muon", "row groups"])
def test_a_turing_card_is_given_what_it_knows(tmp_path, name):
    """fp32 in the place of bf16, and PyTorch's products of integers, for which Triton has no code there."""
    taken = take(config_of(tmp_path, *CASES[name], bf16=False), resumed=True, capability=(7, 5))
    launched = taken.device.launched
    assert not unknown_forms(launched, 75)
    assert not any("int8" in launch.kernel for launch in launched)
    assert not any(str(value) == "bf16" for launch in launched for key, value in launch.constants if key == "operand")


REFERENCE = ("qgalore", "int8 products", "row groups", "rule muon", "rule fira", "4-bit moments", "a mixture")


@pytest.mark.slow
@pytest.mark.parametrize("name", REFERENCE)
def test_no_gpu_would_refuse_a_step_without_kernels(tmp_path, name):
    taken = take(config_of(tmp_path, *CASES[name]), kernels=False)
    assert not any(account.kernels for account in taken.steps)
