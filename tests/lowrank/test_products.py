"""Layers that multiply integers: their gradients, their trials, and training with them."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from qgalore import convert, optimizer
from qgalore.errors import ConfigError
from qgalore.lowrank.layers.linear import LowRankLinear
from qgalore.lowrank.layers.product_choice import MAX_ERROR, Products
from qgalore.models.recompute import checkpoint_blocks

INT8 = ("model.compute=int8", "lowrank.group_size=row")


def layer(device, dtype=torch.float32):
    torch.manual_seed(3)
    made = LowRankLinear(torch.randn(48, 64, device=device), torch.randn(48, device=device), rank=5, group_size=64)
    made.left.assign(torch.linalg.qr(torch.randn(48, 5, device=device)).Q)
    x = torch.randn(3, 7, 64, device=device, dtype=dtype)
    return made, x, torch.randn(3, 7, 48, device=device, dtype=dtype)


def passes(made, x, grad_output):
    x = x.clone().requires_grad_()
    made.delta.grad = None
    y = made(x)
    y.backward(grad_output)
    return y.detach(), x.grad, made.delta.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_integers_change_the_two_products_and_nothing_else(dtype, device, capsys):
    made, x, grad_output = layer(device, dtype)
    y, grad_x, grad_delta = passes(made, x, grad_output)
    made.products = Products("one")
    tried = passes(made, x, grad_output)
    assert (made.products.output.int8, made.products.gradient.int8, made.products.due) == (True, True, False)
    again = passes(made, x, grad_output)
    for first, second in zip(tried, again, strict=True):
        assert torch.equal(first, second)  # a trial returns what it chose
    assert torch.equal(again[2], grad_delta)
    for found, wanted in ((again[0], y), (again[1], grad_x)):
        error = float((found - wanted).float().norm() / wanted.float().norm())
        assert 0.002 < error < 0.015  # crest factors of 2.4 to 3.5 over 127 √12, and bf16
    assert capsys.readouterr().out == ""


def test_outliers_send_a_layer_to_floating_point_and_their_end_brings_it_back(device, capsys):
    made, x, grad_output = layer(device)
    wide = x.clone()
    wide[..., 0] = 100.0
    made.weight[:, 0] = 0  # the outlier reaches no output, its steps do
    made.products = Products("block.mlp")
    on_integers, _, _ = passes(made, x, grad_output)
    assert capsys.readouterr().out == ""
    made.products.retry()
    y, _, _ = passes(made, wide, grad_output)
    assert torch.equal(y, torch.nn.functional.linear(wide, made.dense_weight(), made.bias))
    out = capsys.readouterr().out
    assert "block.mlp (output) in floating point: the error of int8 is" in out
    assert "input gradient" not in out
    assert not torch.equal(passes(made, x, grad_output)[0], on_integers)  # the choice holds until the next trial
    made.products.retry()
    assert torch.equal(passes(made, x, grad_output)[0], on_integers)
    assert "block.mlp (output) in int8 again" in capsys.readouterr().out


def test_the_limit_is_where_it_is_said_to_be(device):
    """A token with one value of c times the others' root mean square is off by c / (127 √12)."""
    torch.manual_seed(0)
    made, _, grad_output = layer(device)
    made.weight[:, 0] = 0
    for crest, taken in ((12.0, True), (32.0, False)):
        x = torch.randn(3, 7, 64, device=device)
        x[..., 0] = crest
        made.products = Products("one")
        passes(made, x, grad_output)
        assert made.products.output.int8 is taken
        assert (crest / (127 * 12**0.5) <= MAX_ERROR) is taken


def test_no_answer_no_choice(device):
    made, x, grad_output = layer(device)
    made.products = Products("one")
    with torch.no_grad():
        assert torch.equal(made(x), torch.nn.functional.linear(x, made.dense_weight(), made.bias))
    for useless in (torch.zeros_like(x), x * float("nan")):
        made.bias.data.zero_()
        passes(made, useless, torch.zeros_like(grad_output))
        assert made.products.due
        assert made.products.output.int8 is None
    made(x).backward(grad_output)  # nobody wants x's gradient
    assert not made.products.due
    state = json.loads(json.dumps(made.products.state()))
    twin = Products("one")
    twin.load(state)
    assert twin == made.products


@pytest.mark.parametrize("group_size", [128, 64, 32])
def test_a_grid_with_several_scales_a_row_is_refused(tiny_llama, group_size):
    with pytest.raises(ConfigError, match="group_size='row'"):
        convert(tiny_llama(), rank=8, group_size=group_size, compute="int8")
    with pytest.raises(ConfigError, match="weight_format='int8'"):
        convert(tiny_llama(), rank=8, group_size="row", weight_format="none", compute="int8")


def test_the_head_and_odd_shapes_stay_in_floating_point(tiny_llama):
    model = tiny_llama(intermediate_size=100)
    report = convert(model, rank=8, group_size="row", compute="int8", include=["*_proj", "lm_head"])
    with_products = {n for n, m in model.named_modules() if isinstance(m, LowRankLinear) and m.products}
    assert with_products == {f"model.layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in "qkvo"}
    assert "100 × 64 stays in floating point: int8 products need sides that are multiples of 8 (4 layers)" in str(
        report
    )
    assert "64 × 100 stays in floating point" in str(report)


def trained(
    tiny_llama,
    batches,
    device,
    stepping="fused",
    checkpointed=False,
    dtype=torch.float32,
    seed=0,
    tied=False,
    **options,
):
    """(state dict, losses) of a model that was trained on integers, or as ``options`` say."""
    model = tiny_llama(device, tie_word_embeddings=tied).to(dtype)
    convert(model, **{"rank": 8, "group_size": "row", "compute": "int8", **options})
    if checkpointed:
        checkpoint_blocks(model, "device")
    model.train()
    stepper = optimizer(model, lr=0.01, stepping=stepping, scale=1.0, update_proj_gap=2, seed=seed)
    losses = []
    for batch in batches:
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        stepper.step()
        losses.append(float(loss.detach()))
    assert all(m.products.output.int8 for m in model.modules() if isinstance(m, LowRankLinear) and m.products)
    return model.state_dict(), torch.tensor(losses)


def test_fused_deferred_and_checkpointed_training_give_the_same_bits(tiny_llama, token_batches, device):
    batches = token_batches(device)
    first, _ = trained(tiny_llama, batches, device)
    for other in ({"stepping": "deferred"}, {"checkpointed": True}):
        for name, value in trained(tiny_llama, batches, device, **other)[0].items():
            assert torch.equal(value, first[name]), name


def test_a_rule_without_refreshes_tries_its_layers_again(tiny_llama, token_batches):
    model = tiny_llama().train()
    convert(model, rank=None, group_size="row", compute="int8")
    stepper = optimizer(model, lr=0.01, stepping="fused", rule="scale", update_proj_gap=2)
    layers = [m for m in model.modules() if isinstance(m, LowRankLinear)]
    due = []
    for batch in token_batches(steps=4):
        due.append({layer.products.due for layer in layers})
        model(input_ids=batch, labels=batch).loss.backward()
        stepper.step()
    assert due == [{True}, {False}, {True}, {False}]


def test_int8_embeddings_and_a_tied_head_train_beside_them(tiny_llama, token_batches, device):
    _, losses = trained(tiny_llama, token_batches(device) * 3, device, embeddings="int8", tied=True)
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_on_integers_stays_with_training_in_floating_point(tiny_llama, token_batches, device, dtype):
    """Within twice what another seed of the stochastic rounding changes: products that are off by 1 % are noise of the
    same kind. Before the first update within 0.2 %, since errors of many tokens cancel in the mean."""
    batches = token_batches(device) * 4
    dense, *others = (
        trained(tiny_llama, batches, device, dtype=dtype, compute="bf16", seed=seed)[1] for seed in range(3)
    )
    _, integers = trained(tiny_llama, batches, device, dtype=dtype)
    noise = max(float((other - dense).abs().mean()) for other in others)
    assert not torch.equal(dense, integers)
    assert dense[-1] < dense[0] - 0.5
    assert integers[0] == pytest.approx(float(dense[0]), rel=0.002)
    assert float((integers - dense).abs().mean()) < 2 * noise


def test_a_resumed_run_keeps_its_choices(tiny_run, tmp_path):
    """Between two trials: the gap is 3 steps, so the choices of step 1 hold in step 3."""
    steps = ("train.max_steps=4", "train.keep_last=5", "train.eval_every=4", "export.formats=[]")
    assert tiny_run(*INT8, *steps)[0] == 0
    shutil.copytree("runs/tiny", "runs/whole")
    shutil.rmtree("runs/tiny/checkpoints/step-00000004")
    code, out, err = tiny_run(*INT8, *steps, "--resume", "auto")
    assert code == 0, err
    assert "after step 2" in out
    name = "checkpoints/step-00000004/model.safetensors"
    whole, cut = (load_file(tmp_path / "runs" / run / name) for run in ("whole", "tiny"))
    assert all(torch.equal(value, cut[key]) for key, value in whole.items())


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (("lowrank.group_size=64",), "set lowrank.group_size: row"),
        (("method=galore",), "set lowrank.weight_format: int8, or model.compute: bf16"),
        (("method=lora",), "those of method lora are not"),
    ],
)
def test_what_it_cannot_work_with_is_refused(tiny_run, extra, said):
    code, _, err = tiny_run(*INT8, *extra)
    assert code == 2
    assert said in err
