"""LoRA: what it computes, what it trains, what it exports, and a run that goes on."""

import shutil
from pathlib import Path

import pytest
import torch
from helpers import loss_of, train
from safetensors.torch import load_file

from qgalore import config
from qgalore.errors import ConfigError
from qgalore.lowrank.factory import optimizer
from qgalore.lowrank.layers import lora
from qgalore.models.convert import convert

SETTINGS = {"rank": 4, "alpha": 8.0, "dtype": torch.float32, "seed": 3}


def adapted(tiny_llama, device="cpu", **changes):
    model = tiny_llama(device)
    convert(model, rank=None)
    assert lora.attach(model, **{**SETTINGS, **changes}) == 14
    return model


def test_it_begins_as_the_model_it_adapts(tiny_llama, token_batches, device):
    (tokens,) = token_batches(device, 1)
    plain = tiny_llama(device)
    convert(plain, rank=None)
    assert torch.equal(loss_of(adapted(tiny_llama, device), tokens), loss_of(plain, tokens))


def test_factors_get_the_gradients_of_the_formula(device):
    """Against a dense W + (α/r) B A in autograd; fp32 sums of at most 48 terms, hence 1e-5."""
    torch.manual_seed(0)
    layer = convert_linear(torch.nn.Linear(48, 20, device=device))
    made = lora.LoraLinear(layer, 3, 6.0, dtype=torch.float32, seed=1, index=0)
    with torch.no_grad():
        made.lora_b.normal_()
    x = torch.randn(5, 48, device=device, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    a, b = (t.detach().clone().requires_grad_() for t in (made.lora_a, made.lora_b))
    dense = layer.dense_weight() + 2.0 * b @ a
    target = torch.randn(5, 20, device=device)
    (made(x) * target).sum().backward()
    ((twin @ dense.T + layer.bias) * target).sum().backward()
    for mine, reference in ((made.lora_a, a), (made.lora_b, b), (x, twin)):
        assert torch.allclose(mine.grad, reference.grad, rtol=1e-5, atol=1e-5)
    assert torch.allclose(made.dense_weight(), dense.detach(), atol=1e-6)
    assert float(made.lora_a.detach().abs().max()) <= 48**-0.5


def convert_linear(linear):
    model = torch.nn.Sequential(linear)
    convert(model, rank=None, group_size="row")
    return model[0]


def test_only_the_factors_and_what_trains_in_full_move(tiny_llama, token_batches, device):
    model = adapted(tiny_llama, device)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    opt = optimizer(model, lr=0.01, inner="adamw", stepping="fused")
    train(model, opt, token_batches(device, 2))
    frozen = [n for n, v in model.state_dict().items() if torch.equal(v, before[n])]
    assert {name.rsplit(".", 1)[-1] for name in frozen} == {"weight", "weight_scale"}
    assert len(frozen) == 2 * 14
    assert opt.untouched == []


def test_a_rank_above_a_side_is_clamped_with_the_same_factor(tiny_llama):
    model = adapted(tiny_llama, rank=1000, alpha=500.0)
    layers = [m for m in model.modules() if isinstance(m, lora.LoraLinear)]
    assert all(layer.lora_rank == min(layer.weight.shape) and layer.scaling == 0.5 for layer in layers)
    based = tiny_llama()
    convert(based, rank=8)
    with pytest.raises(ConfigError, match="rank=None"):
        lora.attach(based, **SETTINGS)


def test_a_run_trains_resumes_and_exports_what_it_trained(tiny_run):
    """The export is the sum, rounded once to bf16; the run that lost its last checkpoints ends in the same bits."""
    extra = ("method=lora", "lowrank.rank=8", "lowrank.alpha=16", "lowrank.scale=null", "train.keep_last=9")
    code, out, err = tiny_run("run.name=whole", *extra)
    assert code == 0, err
    assert "lowrank.rule, lowrank.scale has no effect with method: lora" in out
    shutil.copytree("runs/whole", "runs/cut")
    for step in (4, 6):
        shutil.rmtree(f"runs/cut/checkpoints/step-{step:08d}")
    code, _, err = tiny_run("run.name=cut", "--resume", "auto", *extra)
    assert code == 0, err
    whole, cut = (load_file(Path(f"runs/{n}/checkpoints/step-00000006/model.safetensors")) for n in ("whole", "cut"))
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())
    name = "model.layers.0.self_attn.q_proj"
    assert float(whole[f"{name}.lora_b"].abs().max()) > 0
    q, scale = whole[f"{name}.weight"].float(), whole[f"{name}.weight_scale"].float()
    dense = (q.view(64, scale.shape[1], -1) * scale.unsqueeze(2)).view(64, 64)
    dense += 2.0 * whole[f"{name}.lora_b"].float() @ whole[f"{name}.lora_a"].float()
    exported = load_file("runs/whole/export/hf/model.safetensors")
    assert torch.equal(exported[f"{name}.weight"], dense.bfloat16())
    assert not any("lora" in key for key in exported)

    from qgalore.training import assemble

    model, _ = assemble.restore_model(Path("runs/whole/checkpoints/step-00000006"))
    assert torch.equal(model.get_submodule(name).dense_weight(torch.bfloat16), exported[f"{name}.weight"])
    with pytest.raises(ConfigError, match="export with --format hf"):
        assemble.export_checkpoint(Path("runs/whole/checkpoints/step-00000006"), "int8", Path("x"))


def test_the_plain_weight_can_be_kept_in_floats():
    loaded = config.load("quickstart.yaml", ["method=lora", "lowrank.weight_format=none"])
    assert config.resolve(loaded, "cpu", False).lowrank.weight_format == "none"
