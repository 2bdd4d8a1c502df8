import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import qgalore
from qgalore.lowrank.layers import embedding as module_under_test
from qgalore.lowrank.layers.embedding import LowRankEmbedding, TiedHead
from qgalore.lowrank.layers.head import chunked_cross_entropy
from qgalore.lowrank.layers.linear import LowRankLinear
from qgalore.lowrank.subspace import sides
from qgalore.lowrank.subspace.sides import PROJ_TYPES, project
from qgalore.models.loss import chunked_loss, summed_loss

WIDTH = 32
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # fp32 sums of up to 97 terms of order one, in another order


def made(vocabulary, proj_type, device, *, rank=5, group_size=16, dtype=torch.float32, **options):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vocabulary, WIDTH, generator=generator).to(device, dtype)
    layer = LowRankEmbedding(
        weight, rank=rank, proj_type=proj_type or "std", basis_format="fp32", group_size=group_size, **options
    )
    for side in (layer.left, layer.right):
        if side is not None:
            side.assign(torch.linalg.qr(torch.randn(side.dim, side.rank, generator=generator)).Q.to(device))
    return layer


def dense_copy(layer, **options):
    return nn.Embedding.from_pretrained(layer.dense_weight(), freeze=False, **options)


def some_ids(vocabulary, device, shape=(3, 9)):
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(1)).to(device)


@pytest.mark.parametrize("vocabulary", [97, 11])
@pytest.mark.parametrize("proj_type", [*PROJ_TYPES, None])
@pytest.mark.parametrize("group_size", [None, 16])
def test_delta_gradient_is_the_projected_gradient_of_a_dense_embedding(vocabulary, proj_type, group_size, device):
    layer = made(vocabulary, proj_type, device, rank=proj_type and 5, group_size=group_size)
    dense, ids = dense_copy(layer), some_ids(vocabulary, device)
    grad_output = torch.randn(*ids.shape, WIDTH, device=device)
    layer.probe.requires_grad_(True)
    output = layer(ids)
    assert torch.equal(output, dense(ids))
    output.backward(grad_output)
    dense(ids).backward(grad_output)
    torch.testing.assert_close(layer.delta.grad, project(dense.weight.grad, *layer.columns()), **CLOSE)
    torch.testing.assert_close(layer.probe.grad, dense.weight.grad, **CLOSE)


def test_output_is_in_the_models_dtype_and_follows_it(device):
    layer = made(97, "std", device, dtype=torch.bfloat16)
    ids = some_ids(97, device)
    assert torch.equal(layer(ids), nn.functional.embedding(ids, layer.dense_weight(torch.bfloat16)))
    for dtype in (torch.float32, torch.bfloat16):
        assert layer.to(dtype)(ids).dtype == dtype
    assert copy.deepcopy(layer)(ids).dtype == torch.bfloat16


@pytest.mark.parametrize("wrong", [97, -1])
def test_ids_outside_the_vocabulary_are_refused(wrong):
    with pytest.raises(IndexError):
        made(97, "std", "cpu")(torch.tensor([0, wrong]))


@pytest.mark.parametrize("tile", [1 << 24, 97 * 7])
def test_a_bf16_gradient_is_summed_in_fp32_and_rounded_once(tile, device, monkeypatch):
    """One id 2000 times, each with a gradient near 1: a bf16 running sum would stop growing at 256."""
    monkeypatch.setattr(module_under_test, "TILE_ELEMENTS", tile)
    layer = made(97, "std", device, dtype=torch.bfloat16, grad_dtype=torch.bfloat16)
    layer.probe.requires_grad_(True)
    ids = torch.full((2000,), 5, device=device)
    grad_output = (1 + 0.5 * torch.rand(2000, WIDTH)).to(device, torch.bfloat16)
    layer(ids).backward(grad_output)
    exact = grad_output.double().sum(0)
    torch.testing.assert_close(layer.probe.grad[5].double(), exact, rtol=2.0**-8, atol=0.0)
    # each projected vector is rounded to bf16 once before the sum, by up to 2⁻⁹ of its length
    columns = layer.right.columns().double()
    bound = 2.0**-8 * float(grad_output.double().norm(dim=1).sum())
    assert float((layer.delta.grad[5].double() - exact @ columns).norm()) < bound
    assert layer.delta.grad.dtype == layer.probe.grad.dtype == torch.bfloat16
    assert not layer.probe.grad[:5].any()


def test_a_padding_row_gets_no_gradient(device):
    layer = made(97, "std", device, padding_idx=3)
    layer.probe.requires_grad_(True)
    dense, ids = dense_copy(layer, padding_idx=3), torch.tensor([3, 4, 3, 96], device=device)
    for module in (layer, dense):
        module(ids).square().sum().backward()
    assert not layer.delta.grad[3].any()
    assert layer.delta.grad[4].any()
    torch.testing.assert_close(layer.probe.grad, dense.weight.grad, **CLOSE)
    with pytest.raises(ValueError, match="padding_idx 3 names a frozen row"):
        made(97, "left", device, padding_idx=3)
    with pytest.raises(ValueError, match="no bias"):
        LowRankEmbedding(torch.zeros(4, 4), torch.zeros(4), rank=2)


def tied_gradient(embed, head_loss, ids, leaf):
    leaf.grad = None
    head_loss(torch.tanh(embed(ids)).flatten(0, 1)).backward()
    return leaf.grad.clone()


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("leaf", ["delta", "probe"])
@pytest.mark.parametrize("bias", ["bias", ""])
def test_a_tied_head_adds_its_gradient_to_the_embeddings(proj_type, leaf, bias, device):
    layer = made(97, proj_type, device)
    head = TiedHead(layer, torch.randn(97, device=device) if bias else None)
    dense, ids = dense_copy(layer), some_ids(97, device)
    labels = some_ids(97, device, (27,))
    layer.delta.requires_grad_(leaf == "delta")
    layer.probe.requires_grad_(leaf == "probe")

    def plain(weight):
        return lambda h: nn.functional.cross_entropy(
            nn.functional.linear(h, weight, head.bias), labels, reduction="sum"
        )

    wanted = tied_gradient(dense, plain(dense.weight), ids, dense.weight)
    if leaf == "delta":
        wanted = project(wanted, *layer.columns())
    target = getattr(layer, leaf)
    calls = []
    target.register_post_accumulate_grad_hook(lambda t: calls.append(1))
    whole = tied_gradient(layer, lambda h: nn.functional.cross_entropy(head(h), labels, reduction="sum"), ids, target)
    blocks = tied_gradient(layer, lambda h: chunked_cross_entropy(h, head, labels, limit=27 * 20), ids, target)
    torch.testing.assert_close(whole, wanted, **CLOSE)
    torch.testing.assert_close(blocks, wanted, **CLOSE)
    assert len(calls) == 2


def test_a_tied_head_owns_nothing_but_its_bias(tiny_llama, device):
    model = tiny_llama(device, tie_word_embeddings=True)
    qgalore.convert(model, rank=4, embeddings="int8")
    assert isinstance(model.lm_head, TiedHead)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not any(name.startswith("lm_head") for name in model.state_dict())
    model.tie_weights()  # transformers calls it at times; nothing may change
    twin = copy.deepcopy(model)
    assert twin.lm_head.embedding is twin.model.embed_tokens
    assert twin.lm_head.embedding is not model.lm_head.embedding
    assert model.to(torch.bfloat16).lm_head.embedding is model.model.embed_tokens
    slots = [slot.name for slot in qgalore.optimizer(twin, lr=1e-2).tensors]
    assert slots.count("model.embed_tokens") == 1
    assert not any("lm_head" in name for name in slots)


def batch(device, seed=2):
    ids = torch.randint(0, 60, (4, 17), generator=torch.Generator().manual_seed(seed)).to(device)
    positions = torch.arange(16, device=device).repeat(4, 1)
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "position_ids": positions}


def train(model, device, *, stepping, steps, loss_of=chunked_loss):
    opt = qgalore.optimizer(model, lr=2e-2, stepping=stepping, update_proj_gap=4, scale=1.0)
    losses = []
    for step in range(steps):
        loss = loss_of(model, batch(device, step % 3)) / 64
        loss.backward()
        opt.step()
        assert opt.untouched == []
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("loss_of", [chunked_loss, summed_loss])
def test_training_lowers_the_loss_and_changes_every_row_that_occurs(tiny_llama, device, tied, loss_of):
    model = tiny_llama(device, tie_word_embeddings=tied)
    qgalore.convert(model, rank=8, embeddings="int8")
    before = model.model.embed_tokens.dense_weight().clone()
    head_before = model.lm_head.weight.detach().clone()
    losses = train(model, device, stepping="deferred", steps=30, loss_of=loss_of)
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    changed = (model.model.embed_tokens.dense_weight() != before).any(dim=1)
    occurring = torch.cat([batch(device, seed)["input_ids"] for seed in range(3)]).unique()
    assert bool(changed[occurring].all())
    if tied:
        assert bool(changed.all())  # every row of a softmax gets a gradient
    else:
        assert int(changed.sum()) == len(occurring)
        assert bool((model.lm_head.weight != head_before).any(dim=1).all())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_fused_and_deferred_stepping_agree_bit_for_bit(tiny_llama, device, tied):
    states = []
    for stepping in ("fused", "deferred"):
        model = tiny_llama(device, tie_word_embeddings=tied)
        qgalore.convert(model, rank=8, embeddings="int8")
        train(model, device, stepping=stepping, steps=9)
        states.append(model.state_dict())
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


@pytest.mark.parametrize("proj_type", ["std", "left"])
def test_gradients_have_their_shapes_on_the_meta_device(proj_type):
    """A memory plan rehearses a step there."""
    options = {"rank": 5, "proj_type": proj_type, "grad_dtype": torch.bfloat16}
    layer = LowRankEmbedding(torch.empty(97, WIDTH, dtype=torch.bfloat16, device="meta"), **options)
    layer.probe.requires_grad_(True)
    ids = torch.zeros(3, 9, dtype=torch.int64, device="meta")
    chunked_cross_entropy(layer(ids).flatten(0, 1), TiedHead(layer), ids.flatten(), limit=27 * 20).backward()
    assert layer.delta.grad.shape == layer.delta.shape
    assert layer.probe.grad.shape == (97, WIDTH)
    assert layer.delta.grad.dtype == layer.probe.grad.dtype == torch.bfloat16


class LargestFloat(TorchDispatchMode):
    """Notes the most elements of any fp32 tensor that an operation returns."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for value in output if isinstance(output, tuple | list) else [output]:
            if torch.is_tensor(value) and value.dtype == torch.float32:
                self.largest = max(self.largest, value.numel())
        return output


def test_a_refresh_of_a_bf16_gradient_makes_no_fp32_copy(device, monkeypatch):
    """Nothing in fp32 is larger than a tile: not the gradient, not a sketch of its height, not Δ's gradient."""
    vocabulary, rank, tile = 4000, 5, 4000 * 4
    monkeypatch.setattr(sides, "TILE_ELEMENTS", tile)
    layer = made(vocabulary, "std", device, rank=rank, dtype=torch.bfloat16, grad_dtype=torch.bfloat16)
    opt = qgalore.optimizer(nn.Sequential(layer), lr=1e-2, inner="adamw")
    slot = opt.tensors[0]
    for step in range(2):
        layer.delta.requires_grad_(False)
        layer.probe.requires_grad_(True)
        layer.probe.grad = torch.randn(vocabulary, WIDTH, device=device).to(torch.bfloat16)
        with LargestFloat() as made_here:
            row = slot.refresh(step)
        assert row["failed"] is None
        assert row["energy"] > rank / WIDTH
        assert made_here.largest == tile


def test_an_embedding_is_a_low_rank_layer_without_memory_for_its_leaves(device):
    layer = made(97, "std", "cpu").to(device)
    assert isinstance(layer, LowRankLinear)
    for leaf in (layer.delta, layer.probe):
        assert leaf.untyped_storage().nbytes() == leaf.element_size()
    assert set(layer.state_dict()) == {"weight", "weight_scale", "right.codes"}
