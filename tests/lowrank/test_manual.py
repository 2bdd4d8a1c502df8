"""Manual stepping: the caller says when each tensor steps, and no autograd hook is involved."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from helpers import QUICK, assert_same, loss_of, stored, train

from qgalore.errors import NumericalError
from qgalore.lowrank.factory import optimizer
from qgalore.models.convert import convert

LAZY = {"lr": 5e-3, "weight_decay": 0.01, "update_proj_gap": 3}


def built(tiny_llama, device="cpu", dtype=torch.float32, rank=8, **options):
    model = tiny_llama(device).to(dtype)
    convert(model, **{**QUICK, "rank": rank})
    return model, optimizer(model, **{**LAZY, **options})


def walked(model, opt, batches, micro=1):
    """The head, then the blocks from the last to the first, then the rest, as a layer-major walk steps them."""
    for tokens in batches:
        for part in tokens.chunk(micro):
            (loss_of(model, part) / micro).backward()
        for block in (model.lm_head, model.model.norm, *reversed(model.model.layers), model.model.embed_tokens):
            for tensor in opt.tensors_of(block):
                assert opt.step_tensor(tensor)
                assert not tensor.holds_gradient()
        opt.close()
    return model


@pytest.mark.parametrize("rule", ["galore", "fira"])
def test_manual_and_fused_give_the_same_bits(tiny_llama, token_batches, device, rule):
    results = []
    for stepping, run in (("fused", train), ("manual", walked)):
        model, opt = built(tiny_llama, device, stepping=stepping, rule=rule)
        run(model, opt, token_batches(device, steps=8))
        results.append(stored(model))
        assert opt.untouched == []
        assert opt.step_count == 8
        assert opt.refresh_counts()[0] > 14 * 2
        assert opt.grad_norm > 0
    assert_same(*results)


def test_manual_stepping_has_no_hooks_and_step_does_it_all(tiny_llama, token_batches):
    batches = token_batches(steps=5)
    model, opt = built(tiny_llama, stepping="manual")
    loss_of(model, batches[0]).backward()
    assert opt.events == []  # a first basis waits for the whole step
    opt.zero_grad()
    train(model, opt, batches)
    twin, other = built(tiny_llama, stepping="deferred")
    train(twin, other, batches)
    assert_same(stored(model), stored(twin))


def test_a_first_basis_comes_from_all_micro_batches(tiny_llama, token_batches):
    """Manual stepping finds it in the sum; K micro-batches are then one batch of K times the size, from step 0 on."""
    batch = token_batches(steps=1, rows=8)
    energies = []
    for micro in (1, 4):
        model, opt = built(tiny_llama, stepping="manual")
        walked(model, opt, batch, micro)
        energies.append({event["layer"]: event["energy"] for event in opt.events})
    assert len(energies[0]) == 14
    assert energies[1] == pytest.approx(energies[0], rel=1e-3)


def test_micro_batches_are_added_in_fp32(tiny_llama, token_batches):
    """256 gradients of a bf16 norm: each beyond the first 2⁸ parts is lost where the sum is kept in bf16."""
    model, opt = built(tiny_llama, dtype=torch.bfloat16, stepping="manual", rank=None)
    opt.accumulate_in_fp32()
    norm = model.model.norm.weight
    for _ in range(512):
        (norm.float().sum() * (1 + 2.0**-6)).to(torch.bfloat16).backward()
    assert norm.grad.dtype == torch.float32
    assert torch.allclose(norm.grad, torch.full_like(norm.grad, 512.0), rtol=0.02)
    opt.zero_grad()
    opt.accumulate_in_fp32(False)
    loss_of(model, token_batches(steps=1)[0]).backward()
    assert norm.grad.dtype == torch.bfloat16
    opt.step()
    assert opt.untouched == []


def test_tensors_of_a_module_and_of_parameters(tiny_llama):
    model, opt = built(tiny_llama, stepping="manual")
    names = [tensor.name for tensor in opt.tensors_of(model.model.layers[1])]
    assert len(names) == len(set(names)) == 9
    assert all(name.startswith("model.layers.1.") for name in names)
    assert names.index("model.layers.1.mlp.down_proj") < names.index("model.layers.1.self_attn.q_proj")
    some = [model.model.layers[0].mlp.up_proj.delta, model.model.layers[0].mlp.up_proj.probe, model.model.norm.weight]
    assert [tensor.name for tensor in opt.tensors_of(some)] == ["model.norm.weight", "model.layers.0.mlp.up_proj"]
    assert set(opt.tensors_of(model)) == set(opt.tensors)


def test_clipping_between_preparing_and_applying(tiny_llama, token_batches, device):
    """The norm is that of prepared gradients, refreshed and projected, and ``step()`` applies what was clipped."""
    batches = token_batches(device, steps=2)
    model, opt = built(tiny_llama, device, stepping="manual")
    loss_of(model, batches[0]).backward()
    assert all(opt.prepare_tensor(tensor) for tensor in opt.tensors_of(model))
    norm = opt.clip(model.parameters(), 0.01)
    opt.step()
    assert norm > 0.01
    assert opt.grad_norm == pytest.approx(0.01, rel=1e-3)
    twin, other = built(tiny_llama, device, stepping="deferred")
    loss_of(twin, batches[0]).backward()
    other.refresh()
    assert other.clip(twin.parameters(), 0.01) == pytest.approx(norm, rel=1e-6)
    other.step()
    assert_same(stored(model), stored(twin))


def test_a_tensor_without_a_gradient_is_passed_over_and_named(tiny_llama, token_batches):
    model, opt = built(tiny_llama, stepping="manual")
    loss_of(model, token_batches(steps=1)[0]).backward()
    tensor = opt.tensors_of(model.model.norm)[0]
    tensor.drop_gradient()
    before = copy.deepcopy(model.model.norm.weight)
    assert not opt.step_tensor(tensor)
    assert not opt.inside_step
    opt.step()
    assert opt.untouched == ["model.norm.weight"]
    assert torch.equal(before, model.model.norm.weight)


def test_a_gradient_that_is_not_finite_is_refused_where_it_is_met(tiny_llama, token_batches):
    model, opt = built(tiny_llama, stepping="manual")
    loss_of(model, token_batches(steps=1)[0]).backward()
    module = model.model.layers[0].mlp.up_proj
    module.probe.grad[0, 0] = float("nan")
    tensor = opt.tensors_of(module)[0]
    before = stored(module)
    with pytest.raises(NumericalError, match=r"layers\.0\.mlp\.up_proj is not finite in optimizer step 0"):
        opt.step_tensor(tensor)
    assert_same(before, stored(module))
    opt.skip()
    assert opt.step_count == 1
    assert not any(tensor.holds_gradient() for tensor in opt.tensors)


def test_tensors_that_step_together_step_as_alone(tiny_llama, token_batches, device):
    batches = token_batches(device, steps=2)
    found = []
    for together in (True, False):
        model, opt = built(tiny_llama, device, stepping="manual")
        for batch in batches:
            loss_of(model, batch).backward()
            if together:
                opt.step_tensors(opt.tensors_of(model))
            else:
                for tensor in opt.tensors_of(model):
                    assert opt.step_tensor(tensor)
            opt.close()
        found.append((stored(model), opt.grad_norm))
    assert_same(found[0][0], found[1][0])
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-6)


def test_of_tensors_that_step_together_none_steps_if_one_is_bad(tiny_llama, token_batches):
    model, opt = built(tiny_llama, stepping="manual")
    loss_of(model, token_batches(steps=1)[0]).backward()
    opt.step_tensors(opt.tensors_of(model.model.layers[1]))
    block = model.model.layers[0]
    block.input_layernorm.weight.grad[0] = float("inf")
    before = {name: value for name, value in stored(block).items() if "left" not in name and "right" not in name}
    with pytest.raises(NumericalError, match=r"layers\.0\.input_layernorm\.weight is not finite.*9 of 21 tensors"):
        opt.step_tensors(opt.tensors_of(block))
    after = stored(block)
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_looking_at_a_block_reads_one_value(tiny_llama, token_batches, monkeypatch):
    """Every value that is read makes a GPU wait; a block has nine tensors here."""
    model, opt = built(tiny_llama, stepping="manual", update_proj_gap=1000, stagger=False)
    batches = token_batches(steps=2)
    for number, batch in enumerate(batches):
        loss_of(model, batch).backward()
        if number == 1:  # the bases are there, and no refresh is due
            real = torch.Tensor.__bool__
            places = []  # a CPU reads others too, in its own way of writing back

            def noted(value, real=real, places=places):
                places.append(Path(sys._getframe(1).f_code.co_filename).name)
                return real(value)

            monkeypatch.setattr(torch.Tensor, "__bool__", noted)
            opt.step_tensors(opt.tensors_of(model.model.layers[0]))
            monkeypatch.undo()
            assert places.count("optimizer.py") == 1
            assert set(places) <= {"optimizer.py", "int8.py"}
        opt.step()
