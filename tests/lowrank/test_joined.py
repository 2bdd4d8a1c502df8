"""Matrices of one shape that step together under Muon, against the same step one by one."""

import pytest
import torch
from helpers import QUICK, loss_of

from qgalore.lowrank import optimizer as optimizers
from qgalore.lowrank.factory import optimizer
from qgalore.lowrank.rules import muon
from qgalore.lowrank.tensors import whole
from qgalore.models.convert import convert

# fp32 rounding (2⁻²⁴) of a product of up to 64 terms, at most as large as the polynomials' slopes at zero make it: 8.3,
# 4.1, 3.9, 3.3 and 2.3 of polar_express, whose product is 1000
TOLERANCE = 1000 * 64**0.5 * 2.0**-24


def trained(make, batches, monkeypatch, joined, momentum="fp32"):
    """The changes of the weights by ``batches``, and the shapes that were orthogonalised."""
    monkeypatch.setattr(whole.int8, "kind_of", lambda device: "cuda" if joined else "cpu")
    seen = []

    def counted(matrices):
        seen.append(tuple(matrices.shape))
        return orthogonalize(matrices, dtype=torch.float32)

    orthogonalize = muon.orthogonalize
    with monkeypatch.context() as patch:
        patch.setattr(muon, "orthogonalize", counted)
        model = make()
        convert(model, **{**QUICK, "rank": None}, weight_format="none")
        opt = optimizer(model, lr=0.01, rule="muon", stepping="manual", momentum=momentum)
        before = {tensor.name: tensor.stored.clone() for tensor in opt.tensors if tensor.keeps_whole}
        for tokens in batches:
            loss_of(model, tokens).backward()
            tensors = [tensor for tensor in opt.tensors_of(model) if opt.prepare_tensor(tensor)]
            opt.apply_tensors(tensors)
            opt.close()
        assert not opt.untouched
        return {t.name: t.stored - before[t.name] for t in opt.tensors if t.keeps_whole}, seen, len(opt.observations)


@pytest.mark.parametrize("momentum", ["fp32", "4bit"])
def test_joined_steps_are_those_of_each_matrix(tiny_llama, token_batches, monkeypatch, momentum):
    batches = token_batches(steps=1)
    alone, one_by_one, looks = trained(tiny_llama, batches, monkeypatch, False, momentum)
    joined, at_once, joint_looks = trained(tiny_llama, batches, monkeypatch, True, momentum)
    assert all(len(shape) == 2 for shape in one_by_one)
    assert len(at_once) < len(one_by_one) / 2
    count = sum(shape[0] if len(shape) == 3 else 1 for shape in at_once)
    assert count == len(one_by_one)
    assert looks == joint_looks == len(alone)
    for name, change in alone.items():
        assert float((joined[name] - change).norm() / change.norm()) < TOLERANCE, name


def test_groups_are_small_and_of_one_shape(tiny_llama, monkeypatch):
    monkeypatch.setattr(whole.int8, "kind_of", lambda device: "cuda")
    model = tiny_llama()
    convert(model, **{**QUICK, "rank": None})
    opt = optimizer(model, lr=0.01, rule="muon", stepping="manual")
    size = opt.tensors_of(model.model.layers[0].self_attn.q_proj)[0].stored.numel()
    monkeypatch.setattr(optimizers, "JOINED", 3 * size)
    groups = optimizers.together(opt.tensors)
    assert sorted(tensor.name for group in groups for tensor in group) == sorted(tensor.name for tensor in opt.tensors)
    assert max(len(group) * group[0].stored.numel() for group in groups if len(group) > 1) > 2 * size
    for group in groups:
        assert len({tensor.stored.shape for tensor in group}) == 1
        assert len(group) == 1 or len(group) * group[0].stored.numel() <= 3 * size
        assert len(group) == 1 or all(tensor.keeps_whole for tensor in group)
    sink = optimizer(tiny_llama_converted(tiny_llama), lr=0.01, rule="sinkgd", stepping="manual")
    assert all(len(group) == 1 for group in optimizers.together(sink.tensors))


def tiny_llama_converted(make):
    model = make()
    convert(model, **{**QUICK, "rank": None})
    return model
