"""Liger's kernels in the places of a model's own: which places, what is said, and what a trial lets through."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf

from qgalore import config
from qgalore.errors import ConfigError
from qgalore.memory.stand_ins import kernels as stand_ins
from qgalore.models import elementwise, liger
from qgalore.training import fusing

SHAPE = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip


def built(kind, **more):
    with torch.device("meta"):
        return tf.AutoModelForCausalLM.from_config(getattr(tf, f"{kind}Config")(**{**SHAPE, **more}))


@pytest.mark.parametrize(
    ("kind", "norms", "gates", "turns"),
    [
        ("Llama", 5, 2, 2), ("Mistral", 5, 2, 2), ("Qwen2", 5, 2, 2), ("Qwen3", 9, 2, 2), ("Phi3", 5, 2, 2),
        ("Gemma", 5, 0, 2), ("Gemma3Text", 13, 0, 2), ("GPTNeoX", 0, 0, 2), ("Mamba", None, 0, 0),
    ],
)  # fmt: skip
def test_places_of_architectures(kind, norms, gates, turns):
    """Gemma's activation is a GELU, which SwiGLU is not."""
    found = elementwise.places(built(kind))
    if norms is not None:
        assert len(found["RMSNorm"]) == norms
    assert (len(found["SwiGLU"]), len(found["RoPE"])) == (gates, turns)


def test_what_kernels_move_on_paper_and_that_code_is_whole_afterwards(monkeypatch):
    """Forward and backward pass without values, with kernels that are not there: what they would read and write."""
    model = built("Llama")
    namespace = sys.modules[type(model).__module__]
    own, moved = namespace.apply_rotary_pos_emb, []
    assert elementwise.use(model, None) == (["RMSNorm", "SwiGLU", "RoPE"], [])
    monkeypatch.setattr(
        liger, "launch_on_paper", lambda *sides: moved.extend(t.numel() for side in sides for t in side)
    )
    tokens, width, inner, queries, keys, size = 16, 32, 64, 32, 16, 8
    ids = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    with stand_ins("cuda"):
        model(input_ids=ids, labels=ids).loss.backward()
    norm = 4 * tokens * width + 2 * width + 2 * tokens + (tokens + liger.PROCESSORS) * width
    turned = 2 * (2 * (queries + keys) + 2 * size) * tokens
    assert sum(moved) == 5 * norm + 2 * (3 + 5) * tokens * inner + 2 * turned
    assert all(p.grad.shape == p.shape for p in model.parameters())
    assert namespace.apply_rotary_pos_emb is own


def test_a_copy_of_a_model_computes_with_its_own_tensors():
    model = built("Llama")
    elementwise.use(model, None)
    twin = copy.deepcopy(model)
    changed = [(a, b) for a, b in zip(model.modules(), twin.modules(), strict=True) if "forward" in vars(a)]
    assert len(changed) == 9
    assert all(b.forward.args[0] is b for _, b in changed)


def doubled(x, w):
    return (2 * x * w,)


@pytest.mark.parametrize(
    ("fused", "right"),
    [
        (lambda x, w: (x * w + x * w,), True),
        (lambda x, w: (2.02 * x * w,), False),
        (lambda x, w: (2 * x * w.detach() + 0 * w,), False),
        (lambda x, w: (2 * x * w + torch.nn.functional.one_hot(torch.tensor(3), 64).to(x) * 0.3,), False),
        (lambda x, w: (2 * x * w * float("nan"),), False),
    ],
)
def test_what_a_trial_lets_through(fused, right):
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(shape, generator=generator).bfloat16().requires_grad_() for shape in ((40, 64), (64,))]
    assert (elementwise.excess(doubled, fused, inputs) <= 1.0) == right


class Gate(torch.nn.Module):
    """A gated layer whose own code does something more: what transformers' DeepSeek-V4, Step 3.7 and Seed-OSS do."""

    def __init__(self, limit=None, dropout=0.0):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (torch.nn.Linear(16, 16) for _ in range(3))
        self.act_fn, self.limit, self.dropout = torch.nn.SiLU(), limit, dropout

    def forward(self, x):
        gate, up = self.gate_proj(x).clamp(max=self.limit or torch.inf), self.up_proj(x)
        return torch.nn.functional.dropout(self.down_proj(self.act_fn(gate) * up), self.dropout, self.training)


@pytest.mark.parametrize(
    ("gate", "right"), [(Gate(), True), (Gate(limit=16.0), False), (Gate(dropout=0.1).eval(), False)]
)
def test_what_a_layers_own_code_does_beside_its_gate_is_seen(monkeypatch, gate, right):
    monkeypatch.setattr(liger.SwiGLU, "apply", lambda gate, up: torch.nn.functional.silu(gate) * up)
    (place,) = elementwise.places(gate)["SwiGLU"]
    state = torch.get_rng_state()
    found = elementwise._try(place, elementwise.Sizes(torch.device("cpu"), torch.bfloat16, 1, 64, 1))
    assert (found == 0) == right
    assert torch.equal(torch.get_rng_state(), state)


def test_layers_that_differ_in_a_number_are_tried_apart():
    gates = torch.nn.ModuleList([Gate(), Gate(), Gate(limit=16.0)])
    first, second, third = (place.key for place in elementwise.places(gates)["SwiGLU"])
    assert first == second
    assert third != first


def resolved(*overrides, device="cuda"):
    return config.resolve(config.load("quickstart.yaml", list(overrides)), device, True)


def said(monkeypatch, *overrides, device="cuda", installed=True, kind="Llama", here=None):
    monkeypatch.setattr(fusing, "find_spec", lambda name: object() if installed else None)
    return fusing.fuse_as(resolved(*overrides, device=device), built(kind), here)


LIGER, GPU = "model.elementwise=liger", torch.device("cuda")


def test_what_is_said(monkeypatch):
    assert said(monkeypatch, LIGER) == "Liger's RMSNorm, SwiGLU, RoPE"
    gemma = "Liger's RMSNorm, RoPE; not SwiGLU (the model has none that Liger knows)"
    assert said(monkeypatch, LIGER, kind="Gemma") == gemma
    assert said(monkeypatch, "model.elementwise=plain") is None
    assert said(monkeypatch, device="cpu") is None
    reason = said(monkeypatch, installed=False, here=GPU)
    assert reason.startswith("plain PyTorch and not Liger's kernels: liger-kernel is not installed (pip install liger-")
    assert "kernels is reference" in said(monkeypatch, "kernels=reference", here=GPU)
    assert "compiled blocks have kernels of their own" in said(monkeypatch, "model.compile=blocks", here=GPU)
    with pytest.raises(ConfigError, match=r"it cannot be: RMSNorm \(the model has none"):
        said(monkeypatch, LIGER, kind="GPT2")


def test_a_plan_for_a_gpu_elsewhere_hangs_on_nothing_that_is_installed(monkeypatch):
    for installed in (True, False):
        assert said(monkeypatch, installed=installed) is None


def test_what_must_be_used_and_cannot_be_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match=r"liger, and it cannot be: liger-kernel is not installed.*elementwise=auto"):
        said(monkeypatch, "model.elementwise=liger", installed=False)
    monkeypatch.setattr(fusing, "find_spec", lambda name: object())
    settings = resolved("model.elementwise=liger", device="cpu")
    with pytest.raises(ConfigError, match="no Triton kernel runs on cpu here"):
        fusing.fuse_as(settings, built("Llama"), torch.device("cpu"))


def test_that_is_said_before_anything_slow_begins(tiny_run):
    """Before a tokenizer is trained."""
    code, out, err = tiny_run("model.elementwise=liger", "device=cpu")
    assert code == 2
    assert "model.elementwise is liger, and it cannot be" in err
    assert "tokenizer:" not in out


@pytest.mark.slow
def test_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    pytest.importorskip("liger_kernel")
    place = Path(__file__).resolve().parents[1] / "steps" / "test_fused_kernels.py"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-n", "0", str(place)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
