"""Compiled blocks: the same training, and a number of graphs that does not grow with it."""

import pytest
import torch
from torch._dynamo.utils import counters

from qgalore import convert, optimizer
from qgalore.errors import ConfigError
from qgalore.models import compiling
from qgalore.models.checkpointing import checkpoint_blocks


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def trained(tiny_llama, batches, backend, *, stepping="fused", checkpointed=False, device="cpu", layers=2, **options):
    """(losses, state dict, graphs after each step). Every layer is refreshed in every third step or so, in turn."""
    model = tiny_llama(device, num_hidden_layers=layers, attn_implementation="sdpa")
    convert(model, rank=8, **options)
    if checkpointed:
        checkpoint_blocks(model, "device")
    if backend is not None:
        assert compiling.compile_blocks(model, "delta", backend) == layers
    model.train()
    stepper = optimizer(model, lr=0.01, stepping=stepping, scale=1.0, update_proj_gap=3, cos_threshold=2.0)
    losses, graphs = [], []
    for step, batch in enumerate(batches):
        stepper.param_groups[0]["lr"] = 0.01 / (1 + step)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        stepper.step()
        losses.append(float(loss.detach()))
        graphs.append(counters["stats"]["unique_graphs"])
    return losses, model.state_dict(), graphs


CASES = {
    "fused": {},
    "deferred, checkpointed, int8": {
        "stepping": "deferred",
        "checkpointed": True,
        "compute": "int8",
        "group_size": "row",
    },
}


@pytest.mark.parametrize("case", CASES)
def test_one_graph_serves_all_blocks_and_steps(tiny_llama, token_batches, device, case):
    """Traced, not rewritten: the same bits. The first step finds bases, the others refresh some layers in turn."""
    batches = token_batches(device, steps=8)
    losses, state, _ = trained(tiny_llama, batches, None, device=device, **CASES[case])
    again, found, graphs = trained(tiny_llama, batches, "aot_eager", device=device, **CASES[case])
    assert again == losses
    assert all(torch.equal(value, found[name]) for name, value in state.items())
    assert graphs[0] == 0
    assert graphs[-1] == 1
