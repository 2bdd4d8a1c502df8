"""Liger's kernels in the places of a model, interpreted on the CPU: beside the model's own code, in a walk, and wrong.

The interpreter must be chosen before anything imports Triton, so ``test_elementwise.py`` runs this file anew.
"""

import os

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("liger_kernel")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by test_elementwise.py", allow_module_level=True)
import triton.language as tl
import zoo
from liger_kernel.ops import rms_norm, rope, swiglu
from triton.runtime import interpreter
from walks import converted, ordinary, same, walked

from qgalore.models import elementwise, liger

ALL = ["RMSNorm", "SwiGLU", "RoPE"]


def sizes(dtype=torch.float32, rows=1):
    return elementwise.Sizes(torch.device("cpu"), dtype, rows, 3, 4)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Triton's interpreter makes no tensors of numbers that are not whole, and knows no function of CUDA's library."""
    own = interpreter._implicit_cvt

    def convert(value):
        if isinstance(value, float):
            return tl.tensor(interpreter.TensorHandle(np.array([value], np.float32), tl.float32), tl.float32)
        return own(value)

    monkeypatch.setattr(interpreter, "_implicit_cvt", convert)
    monkeypatch.setattr(rms_norm, "rsqrt", lambda x: tl.math.rsqrt(x))
    elementwise._results.cache_clear()
    for name, (kind, shape) in list(zoo.CAUSAL.items()):  # an interpreted launch takes milliseconds
        monkeypatch.setitem(zoo.CAUSAL, name, (kind, {**shape, "num_hidden_layers": 1}))


def castings(model):
    """Where Liger rounds in the norms of a model that it was put into, and what it adds to their weights."""
    return {m.forward.args[2:] for m in model.modules() if "forward" in vars(m) and len(m.forward.args) == 4}


@pytest.mark.parametrize(
    ("name", "dtype", "used", "casting"),
    [
        ("llama", torch.float16, ALL, ("llama", 0.0)),
        ("gemma2", torch.float16, ["RMSNorm", "RoPE"], ("gemma", 1.0)),
        ("phi3", torch.float32, ALL, None),
        ("qwen3", torch.float32, ALL, None),
    ],
)
def test_models_compute_what_they_did(name, dtype, used, casting):
    """In fp16 the ways to round can be told apart. Names and values of tensors stay."""
    plain, loss = zoo.build(name)
    fused, _ = zoo.build(name)
    found, kept = elementwise.use(fused, sizes(dtype, rows=2))
    assert found == used
    assert len(kept) == len(ALL) - len(used)
    if casting is not None:
        assert castings(fused) == {casting}
    assert plain.state_dict().keys() == fused.state_dict().keys()
    (batch,) = zoo.batches(name, 1)
    for model in (plain, fused):
        torch.manual_seed(0)
        loss(model, batch).backward()
    for key, wanted in zoo.gradients(plain).items():
        gradient = dict(fused.named_parameters())[key].grad
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=2e-5 * float(wanted.abs().max()), msg=key)
    assert all(torch.equal(v, fused.state_dict()[k]) for k, v in plain.state_dict().items())


def test_blocks_may_run_again():
    """The walk, which keeps inputs of blocks and runs these again, gives the bits of ordinary accumulation."""
    model, loss = converted("llama")
    assert elementwise.use(model, sizes())[0] == ALL
    micro_batches = zoo.batches("llama", 2)
    losses, expected = ordinary(model, loss, micro_batches)
    seen, found = walked(model, loss, micro_batches)
    assert seen == losses
    same("llama", expected, found)


def test_nothing_that_others_may_read_is_written_over():
    q, k, given = (torch.randn(1, 6, heads, 8).transpose(1, 2).requires_grad_() for heads in (4, 2, 4))
    angles = torch.randn(1, 6, 4).repeat(1, 1, 2)
    before = [value.detach().clone() for value in (q, k, given)]
    turned, _ = liger.Rotary.apply(q, k, angles.cos(), angles.sin())
    turned.backward(given.detach())
    x, weight = torch.randn(6, 32, requires_grad=True), torch.randn(32, requires_grad=True)
    gradient = torch.randn(6, 32)
    kept = gradient.clone()
    liger.RMSNorm.apply(x, weight, 1e-6, 0.0, "llama").backward(gradient)
    assert torch.equal(gradient, kept)
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, given), strict=True))


def test_a_second_backward_pass_through_what_was_written_over_is_an_error():
    gate, up = (torch.randn(4, 32, requires_grad=True) * 1.0 for _ in range(2))
    y = liger.SwiGLU.apply(gate, up)
    y.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        y.sum().backward()


def changed(place, what):
    """What a function of Liger's returns, with ``what`` done to the result in ``place``."""

    def wrap(own):
        def wrong(*args, **kwargs):
            found = list(own(*args, **kwargs))
            found[place] = what(found[place].clone())
            return tuple(found)

        return wrong

    return wrap


def one_value(values):
    values.view(-1)[7] += 0.05
    return values


@pytest.mark.parametrize(
    ("kind", "module", "name", "wrong"),
    [
        ("SwiGLU", swiglu, "swiglu_forward", changed(2, lambda y: y * 1.003)),
        ("SwiGLU", swiglu, "swiglu_forward", changed(2, one_value)),
        ("SwiGLU", swiglu, "swiglu_backward", changed(0, torch.zeros_like)),
        ("RMSNorm", rms_norm, "rms_norm_backward", changed(1, lambda dw: dw * 1.01)),
        ("RMSNorm", rms_norm, "rms_norm_forward", changed(0, lambda y: y * float("nan"))),
        ("RoPE", rope, "rope_backward", changed(1, torch.neg)),
    ],
)
def test_a_wrong_kernel_is_not_used(monkeypatch, kind, module, name, wrong):
    monkeypatch.setattr(module, name, wrong(getattr(module, name)))
    model, _ = zoo.build("mistral")
    used, kept = elementwise.use(model, sizes(torch.float16))
    assert used == [other for other in ALL if other != kind]
    assert kept[0].startswith(f"{kind} (its error is ")
    assert not any("forward" in vars(p.module) for p in elementwise.places(model)[kind])
