"""How many calls and files a reader meets on the way of one gradient, counted by running it.

Counted is every Python call into a file of the package, from the autograd hook on, while an ordinary gradient (no
refresh) of one layer is stepped and written back under fused stepping. That includes comprehensions and lambdas, which
are functions to Python 3.11. What a function of ``quant`` calls in turn is not counted among the hops: it is arithmetic
on tensors, of which Triton kernels are another version, and no more of the way than the products of PyTorch are. All
calls, those inside ``quant`` too, have a limit of their own.
"""

import os
import sys

import torch

import qgalore

ROOT = os.path.dirname(qgalore.__file__) + os.sep
MOST_CALLS, MOST_FILES, MOST_IN_ALL = 30, 7, 51


def ordinary_gradient(inner):
    """A layer with an int8 weight and an int4 basis, and its loss in a step without a refresh."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 256, bias=False))
    qgalore.convert(model, rank=8)
    optimizer = qgalore.optimizer(model, lr=1e-2, stepping="fused", inner=inner)
    x = torch.randn(8, 256)
    for _ in range(2):
        model(x).square().mean().backward()
        optimizer.step()
    return model, model(x).square().mean(), optimizer


def traced(work):
    """(hops, all calls) of ``work`` from the hook on, each the file and the name of a function."""
    hops, calls = [], []

    def note(frame, event, _):
        path = frame.f_code.co_filename
        if event != "call" or not path.startswith(ROOT):
            return
        call = path.removeprefix(ROOT), frame.f_code.co_name
        if not calls and call[0] != os.path.join("lowrank", "hooks.py"):
            return  # still inside the layer's backward
        calls.append(call)
        above = frame.f_back
        while above is not None and not above.f_code.co_filename.startswith(ROOT + "quant" + os.sep):
            above = above.f_back
        if above is None:
            hops.append(call)

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return hops, calls


def test_the_way_of_an_ordinary_gradient_is_short():
    model, loss, optimizer = ordinary_gradient("adamw8bit")
    before = model[0].weight.clone()
    hops, calls = traced(loss.backward)
    listing = "\n".join(f"{path}: {name}" for path, name in hops)
    assert list(optimizer.stepped) == ["0"], "no step was taken"
    assert not torch.equal(model[0].weight, before)
    assert len(hops) <= MOST_CALLS, listing
    assert len({path for path, _ in hops}) <= MOST_FILES, listing
    assert len(calls) <= MOST_IN_ALL, calls


def test_the_count_sees_the_hook_the_step_and_the_doors_of_quant():
    _, loss, _ = ordinary_gradient("adamw")
    hops, calls = traced(loss.backward)
    names = [name for _, name in hops]
    assert names[0] == "arrived"
    assert names[-2:] == ["drop_gradient", "observation"]
    assert {"step_tensor", "merge", "derive_key"} <= set(names)
    assert "write_back" not in names
    assert "write_back" in [name for _, name in calls]
