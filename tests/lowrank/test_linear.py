import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from qgalore.lowrank.layers.bases import Basis
from qgalore.lowrank.layers.linear import LowRankLinear
from qgalore.lowrank.subspace.sides import PROJ_TYPES, basis_sides, project
from qgalore.models.convert import convert

SHAPES = [(48, 32), (32, 48), (40, 40), (33, 7)]


def layer(shape, proj_type, device, *, group_size=None, fmt="fp32", rank=5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(device, dtype)
    bias = torch.randn(shape[0], generator=generator).to(device, dtype)
    made = LowRankLinear(weight, bias, rank=rank, proj_type=proj_type, basis_format=fmt, group_size=group_size)
    for side in (made.left, made.right):
        if side is not None:
            side.assign(torch.linalg.qr(torch.randn(side.dim, side.rank, generator=generator)).Q.to(device))
    return made


def reference_gradients(made, x, grad_output):
    """Autograd through an ordinary dense layer."""
    weight = made.dense_weight().requires_grad_()
    bias = made.bias.detach().clone().requires_grad_()
    x = x.detach().clone().requires_grad_()
    y = torch.nn.functional.linear(x, weight, bias)
    y.backward(grad_output)
    return y, x.grad, weight.grad, bias.grad


@pytest.mark.parametrize(
    ("proj_type", "tall", "wide"),
    [("std", (0, 1), (1, 0)), ("reverse_std", (1, 0), (0, 1)), ("left", (1, 0), (1, 0)), ("right", (0, 1), (0, 1))],
)
def test_sides(proj_type, tall, wide):
    assert basis_sides(8, 4, proj_type) == tall
    assert basis_sides(4, 8, proj_type) == wide
    assert basis_sides(4, 8, "full") == (True, True)
    with pytest.raises(ValueError, match="diagonal"):
        basis_sides(4, 8, "diagonal")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("group_size", [None, "row"])
def test_delta_gradient_is_the_projected_gradient(shape, proj_type, group_size, device):
    made = layer(shape, proj_type, device, group_size=shape[1] if group_size else None)
    x = torch.randn(3, 6, shape[1], device=device, requires_grad=True)
    grad_output = torch.randn(3, 6, shape[0], device=device)
    y = made(x)
    y.backward(grad_output)
    y_ref, grad_x, gradient, grad_bias = reference_gradients(made, x, grad_output)
    close = {"rtol": 1e-5, "atol": 1e-4}  # sums of up to 48 products of fp32 values of order one
    torch.testing.assert_close(y, y_ref, **close)
    torch.testing.assert_close(x.grad, grad_x, **close)
    torch.testing.assert_close(made.bias.grad, grad_bias, **close)
    torch.testing.assert_close(made.delta.grad, project(gradient, *made.columns()), **close)
    assert made.probe.grad is None


def test_probe_gradient_is_the_full_gradient(device):
    made = layer((48, 32), "std", device)
    made.probe.requires_grad_(True)
    made.delta.requires_grad_(False)
    x, grad_output = torch.randn(5, 32, device=device), torch.randn(5, 48, device=device)
    made(x).backward(grad_output)
    assert made.delta.grad is None
    torch.testing.assert_close(made.probe.grad, reference_gradients(made, x, grad_output)[2], rtol=1e-5, atol=1e-5)


def test_leaves_own_no_memory_and_survive_moves(device):
    made = layer((48, 32), "std", "cpu", group_size=32, fmt="int4")
    for moved in (made, made.to(device), copy.deepcopy(made), made.to(device).eval().train()):
        for leaf in (moved.delta, moved.probe):
            assert leaf.untyped_storage().nbytes() == leaf.element_size()
            assert leaf.device.type == moved.weight.device.type
    assert dict(made.named_parameters())["delta"] is made.delta
    twin = copy.deepcopy(made)
    twin.weight.zero_()
    assert bool(made.weight.any())
    x = torch.randn(4, 32, device=device)
    made(x).sum().backward()
    assert made.delta.grad.shape == (48, 5)


def test_state_dict_holds_storage_only(device):
    made = layer((48, 32), "std", device, group_size=32, fmt="int4")
    state = made.state_dict()
    assert set(state) == {"weight", "weight_scale", "bias", "right.codes", "right.scale"}
    other = layer((48, 32), "std", device, group_size=32, fmt="int4").requires_grad_(False)
    other.weight.zero_()
    assert other.load_state_dict(state, strict=True).missing_keys == []
    assert torch.equal(other.weight, made.weight)


def test_basis_round_trip_and_bytes(device):
    columns = torch.linalg.qr(torch.randn(256, 16, device=device)).Q
    stored = Basis(256, 16, "int4", device)
    stored.assign(columns)
    assert stored.codes.untyped_storage().nbytes() == 256 * 16 // 2
    # int4 over groups of 128 Gaussian values: a step of about 2.7 σ / 7, an error of 1/12 of its square
    error = float((stored.columns() - columns).square().sum() / columns.square().sum())
    assert error < 2 * (2.7 / 7) ** 2 / 12


def test_bf16_input_is_computed_in_bf16(device):
    made = layer((48, 32), "std", device, group_size=32)
    assert made(torch.randn(4, 32, device=device, dtype=torch.bfloat16)).dtype == torch.bfloat16
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert made(torch.randn(4, 32, device=device)).dtype == torch.bfloat16


def block_gradients(block, hidden, rotary, run):
    for parameter in block.parameters():
        parameter.grad = None
    x = hidden.clone().requires_grad_()
    output = run(block, x, rotary)
    output.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in block.named_parameters() if p.grad is not None}
    return {**grads, "input": x.grad}


def call(block, x, rotary):
    output = block(x, position_embeddings=rotary)
    return output[0] if isinstance(output, tuple) else output


@pytest.fixture
def block(tiny_llama, device):
    model = tiny_llama(device, hidden_size=64, intermediate_size=96)
    convert(model, rank=8)
    made = model.model.layers[0]
    for module in made.modules():
        if isinstance(module, Basis):
            module.assign(torch.linalg.qr(torch.randn(module.dim, module.rank, device=device)).Q)
    made.mlp.up_proj.probe.requires_grad_(True)
    hidden = torch.randn(2, 12, 64, device=device)
    return made, hidden, model.model.rotary_emb(hidden, torch.arange(12, device=device)[None])


def test_checkpointing_gives_the_same_gradients(block):
    def checkpointed(made, x, rotary):
        return checkpoint(lambda h: call(made, h, rotary), x, use_reentrant=False)

    plain, again = block_gradients(*block, call), block_gradients(*block, checkpointed)
    assert plain.keys() == again.keys()
    assert len(plain) >= 10
    for name, gradient in plain.items():
        assert torch.equal(gradient, again[name]), name


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_block_gives_the_same_gradients(block, backend):
    made, hidden, rotary = block
    compiled = torch.compile(made, fullgraph=True, backend=backend)
    plain = block_gradients(made, hidden, rotary, call)
    again = block_gradients(made, hidden, rotary, lambda _, x, r: call(compiled, x, r))
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        # other fusion, other summation order: fp32 error relative to the gradient's size
        error = float((gradient - again[name]).norm() / gradient.norm())
        assert error < 1e-5, name


@pytest.mark.parametrize("fmt", ["fp32", "bf16", "nf4", "int4"])
def test_columns_read_before_a_new_basis_stay_the_old_ones(fmt):
    """The moments rotate by P_newᵀ P_old, so reading P_old must not follow what is stored afterwards."""
    basis = Basis(32, 4, fmt)
    basis.assign(torch.linalg.qr(torch.randn(32, 4)).Q)
    old = basis.columns()
    kept = old.clone()
    basis.assign(torch.linalg.qr(torch.randn(32, 4)).Q)
    assert torch.equal(old, kept)
    assert not torch.equal(old, basis.columns())
