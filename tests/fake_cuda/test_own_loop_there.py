"""A program's own model, already on the device, converted and stepped by the library. The program has made the device
its default, which nothing that is the host's may follow."""

import pytest
import torch
from pretended import pretended
from pretended_device import DEVICE
from transformers import LlamaConfig, LlamaForCausalLM

import qgalore
from qgalore.models.loss import summed_loss

SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 512}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture
def model():
    """In bf16, on the device, converted there."""
    with pretended() as device, device.mode, device, torch.device(DEVICE):
        made = LlamaForCausalLM._from_config(LlamaConfig(**SHAPE, **HEADS), dtype=torch.bfloat16)
        qgalore.convert(made, rank=32)
        yield made.train()


def batch() -> dict[str, torch.Tensor]:
    ids = torch.zeros(2, 64, dtype=torch.int64, device=DEVICE)
    return {"input_ids": ids, "labels": ids.clone(), "position_ids": ids.clone()}


def test_everything_that_is_converted_stays_on_the_device(model):
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert {tensor.device for tensor in tensors.values()} == {DEVICE}


def test_a_step_in_one_call(model):
    made = qgalore.optimizer(model, lr=1e-3, stepping="manual", update_proj_gap=2)
    for _ in range(2):
        taken = qgalore.step(model, made, [batch(), batch()], loss=summed_loss)
    assert taken.blocks == 2


@pytest.mark.parametrize("stepping", ["deferred", pytest.param("fused", marks=pytest.mark.slow)])
def test_an_ordinary_loop(model, stepping):
    made = qgalore.optimizer(model, lr=1e-3, stepping=stepping, update_proj_gap=2)
    for _ in range(2):
        summed_loss(model, batch()).backward()
        if stepping == "deferred":
            made.refresh()
            made.clip(model.parameters(), 1.0)
        made.step()
    assert not made.untouched
