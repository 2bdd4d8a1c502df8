"""``model.attention`` in plans, counts and runs, and what ``run.deterministic`` asks for."""

import json
import os

import pytest
import torch
from helpers import assert_same, final_state, reseal
from torch.utils._python_dispatch import TorchDispatchMode

from qgalore import config
from qgalore.data.documents import Documents
from qgalore.errors import ConfigError
from qgalore.memory import stand_ins
from qgalore.memory.rehearsal import Step, ids, mask
from qgalore.models import attention
from qgalore.models.compiling import blocks_of
from qgalore.models.loss import chunked_loss
from qgalore.speed import count
from qgalore.training.attending import attend_as
from qgalore.training.determinism import deterministic
from qgalore.training.loop import Loop
from qgalore.training.model import Vocabulary
from qgalore.training.paper import on_paper, plan_for

WORDS = Vocabulary(512, None, None)
LENGTH = 8192


def resolved(*overrides, device="cuda"):
    small = "model.overrides={num_hidden_layers: 2, vocab_size: 512, max_position_embeddings: 8192}"
    long = (small, f"data.sequence_length={LENGTH}", "train.micro_batch_size=1", "train.activation_checkpointing=false")
    return config.resolve(config.load("quickstart.yaml", [*long, *overrides]), device, True)


class Largest(TorchDispatchMode):
    """The largest memory that an operation gives."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, torch.Tensor):
                self.nbytes = max(self.nbytes, value.untyped_storage().nbytes())
        return out


def planned(*overrides):
    with Largest() as seen:
        return plan_for(resolved(*overrides), WORDS, "cuda").total, seen.nbytes


def test_a_plan_of_long_rows_holds_no_square_and_that_of_a_mask_does():
    """A mask is kept once in a byte, and by each of two layers in two. Peaks come at other moments then, when other
    things are there too, but less than one more square of bytes."""
    separate, largest = planned()
    assert largest < LENGTH**2
    masked, _ = planned("model.attention=sdpa")
    assert 5 * LENGTH**2 < masked - separate < 6 * LENGTH**2
    blocks, largest = planned("model.attention=flex")
    assert largest < LENGTH**2
    assert blocks == pytest.approx(separate, rel=0.1)


def attended(way, documents=None):
    """The operations of attention in a step."""
    model, optimizer = on_paper(resolved(f"model.attention={way}"), WORDS)
    step = Step(chunked_loss, 1, LENGTH, masked=documents is not None)
    batch = ids(step) | mask(model, step)
    if documents is not None and "documents" in batch:
        batch["documents"] = documents
    blocks = list(blocks_of(model))
    how = {"micro_batches": 1, "recomputed": False, "stand_in": stand_ins.kernels("cuda")}
    return count(model.train(), optimizer.tensors, blocks, chunked_loss, batch, **how).attention


def test_eight_documents_take_an_eighth_and_a_mask_takes_all():
    eight = Documents([(LENGTH // 8,) * 8])
    whole = attended("auto")
    assert attended("auto", eight) == pytest.approx(whole / 8, rel=1e-9)
    assert attended("sdpa", eight) == pytest.approx(2 * whole, rel=1e-9)


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match=r"attention is flex, which has no backward pass on a CPU; set model\.att"):
        resolved("model.attention=flex", device="cpu")
    with pytest.raises(ConfigError, match=r"model\.attention: flex would have compiled blocks compiled anew"):
        resolved("model.attention=flex", "model.compile=blocks")
    with pytest.raises(ConfigError, match=r"model\.attention: flex is for documents packed into rows"):
        resolved("model.attention=flex", "data.task=classify", "data.valid=x", "data.tokenizer=y")


def test_compiled_blocks_and_mixtures():
    """Compiled blocks keep a mask and say so, and so does a mixture whose own loss reads it. Any other mixture has
    calls for its documents, whatever dtypes its experts' kernels know."""
    settings = resolved("model.compile=blocks")
    model, _ = on_paper(settings, WORDS)
    assert attention.implementation(model) == "sdpa"
    assert "because a compiled block would be compiled anew" in attend_as(settings, model)
    for balanced, dtype in (("true", "float32"), ("false", "float32"), ("false", "bfloat16")):
        shape = f"model.overrides={{num_hidden_layers: 2, vocab_size: 512, output_router_logits: {balanced}}}"
        mixture = ("model.config=mixtral_quickstart", shape, "data.sequence_length=64", f"model.dtype={dtype}")
        model, _ = on_paper(resolved(*mixture), WORDS)
        expected = "sdpa" if balanced == "true" else attention.BY_DOCUMENT
        assert attention.implementation(model) == expected


SHORT = ("train.max_steps=4", "train.save_every=2", "export.formats=[]", "sample.max_new_tokens=0")


def test_a_run_says_how_it_attends(tiny_run, tmp_path):
    code, out, err = tiny_run("train.max_steps=1", "sample.max_new_tokens=0")
    assert code == 0, err
    assert "attention: a causal call for each document\n" in out
    exported = (tmp_path / "runs/tiny/export/hf/config.json").read_text()
    assert attention.BY_DOCUMENT not in exported
    assert "attn_implementation" not in exported
    code, out, err = tiny_run("run.name=eager", "train.max_steps=1", "model.attention=eager", *SHORT[2:])
    assert code == 0, err
    assert "attention: all scores of a row at once, and a mask\n" in out


def test_a_run_from_before_the_key_goes_on_as_it_began(tiny_run, tmp_path):
    """Its checkpoint does not say how it attends; it had a mask. Bit for bit, and again from its later checkpoints."""
    assert tiny_run("run.name=whole", "model.attention=sdpa", *SHORT)[0] == 0
    assert tiny_run("run.name=old", "model.attention=sdpa", "train.max_steps=2", *SHORT[1:])[0] == 0
    place = tmp_path / "runs/old/checkpoints/step-00000002"
    state = json.loads((place / "state.json").read_text())
    del state["config"]["model"]["attention"]
    reseal(place, state)
    code, out, err = tiny_run("run.name=old", "--resume", "auto", *SHORT)
    assert code == 0, err
    assert "model.attention=sdpa, as the run has it" in out
    assert_same(final_state("runs/whole", 4), final_state("runs/old", 4))
    code, _, err = tiny_run("run.name=old", "--resume", "auto", *SHORT, "train.max_steps=5")
    assert code == 0, err


def test_a_deterministic_run_on_a_cpu_has_the_same_bits(tiny_run, monkeypatch):
    step, asked = Loop._step, []

    def watched(self):
        asked.append(torch.are_deterministic_algorithms_enabled())
        return step(self)

    monkeypatch.setattr(Loop, "_step", watched)
    assert tiny_run("run.name=plain", *SHORT)[0] == 0
    code, _, err = tiny_run("run.name=fixed", "run.deterministic=true", *SHORT)
    assert code == 0, err
    assert asked == [False] * 4 + [True] * 4
    assert_same(final_state("runs/plain", 4), final_state("runs/fixed", 4))
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_operation_without_such_a_kernel_is_refused(monkeypatch):
    """``put_`` without accumulation is one that PyTorch names itself."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    refused = pytest.raises(ConfigError, match=r"no kernel that gives the same bits.*Set run\.deterministic=false")
    with refused, deterministic(True):
        torch.zeros(4).put_(torch.tensor([1, 1]), torch.ones(2), accumulate=False)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(ConfigError, match="the environment says CUBLAS_WORKSPACE_CONFIG=:0:0"), deterministic(True):
        pass
    with deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled()
