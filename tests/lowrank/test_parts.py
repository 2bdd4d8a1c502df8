"""Large tensors step in parts, by rows, and nothing but the scratch memory notices."""

import pytest
import torch

from qgalore.lowrank import factory as module
from qgalore.models.convert import convert

LIMIT = 16384


def trained(model, batches, monkeypatch, limit, **options):
    monkeypatch.setattr(module, "PART_ELEMENTS", limit)
    convert(model, rank=32, proj_type="right", group_size=32)
    opt = module.optimizer(model, lr=0.01, weight_decay=0.1, update_proj_gap=2, seed=3, **options)
    for tokens in batches:
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        opt.step()
    return model, opt


@pytest.mark.parametrize("inner", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_give_the_same_bits(tiny_llama, token_batches, monkeypatch, device, inner, dtype):
    """Both Adams work on single values and on blocks of 256, and random bits are indexed by the whole tensor's rows."""
    shape = {"vocab_size": 1003, "hidden_size": 96, "intermediate_size": 512}
    runs = [
        trained(tiny_llama(device, **shape).to(dtype), token_batches(device), monkeypatch, limit, inner=inner)
        for limit in (1 << 30, LIMIT)
    ]
    (whole, one), (split, several) = runs
    assert max(len(slot.parts) for slot in one.tensors) == 1
    assert {len(slot.parts) for slot in several.tensors} == {1, 6}
    assert all(part.leaf.numel() <= LIMIT + 256 * 96 for slot in several.tensors for part in slot.parts)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, split.state_dict()[name]), name


def test_parts_resume(tiny_llama, token_batches, monkeypatch):
    shape = {"vocab_size": 1003, "hidden_size": 96}
    batches = token_batches(steps=4)
    whole, _ = trained(tiny_llama(**shape), batches, monkeypatch, LIMIT)
    half, opt = trained(tiny_llama(**shape), batches[:2], monkeypatch, LIMIT)
    weights, state = half.state_dict(), opt.state_dict()
    assert any(name.startswith("5.state1") for slot in state["slots"].values() for name in slot["inner"])
    again, opt = trained(tiny_llama(**shape), [], monkeypatch, LIMIT)
    again.load_state_dict(weights)
    opt.load_state_dict(state)
    for tokens in batches[2:]:
        logits = again(input_ids=tokens[:, :-1], use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        opt.step()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_a_matrix_wise_optimizer_sees_whole_tensors(tiny_llama, token_batches, monkeypatch):
    options = {"inner": "torch.optim.Adafactor", "inner_options": {"eps": (None, 1.0)}, "moments": "keep"}
    _, opt = trained(tiny_llama(vocab_size=1003, hidden_size=96), [], monkeypatch, LIMIT, **options)
    assert all(len(slot.parts) == 1 for slot in opt.tensors)
