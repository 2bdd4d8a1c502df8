"""What comes again in a rehearsal, from memory: the same shapes, and nothing that hands on what it was given."""

import pytest
import torch

from qgalore.memory.repeats import Repeats

aten = torch.ops.aten


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (aten.mm.default, lambda: (meta(3, 4), meta(4, 5))),
        (aten.add.Tensor, lambda: (meta(3, 4).T, meta(4, 3, dtype=torch.bfloat16))),
        (aten.sum.dim_IntList, lambda: (meta(3, 4), [0])),
        (aten.topk.default, lambda: (meta(3, 8), 2)),
        (aten._to_copy.default, lambda: (meta(3, 4).T,)),
    ],
)
def test_the_second_result_is_like_the_first(func, args):
    repeats = Repeats()
    first, second = (repeats.run(func, args(), {}) for _ in range(2))
    wanted = func(*args())
    for a, b, c in zip(*((x if isinstance(x, tuple) else (x,)) for x in (first, second, wanted)), strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype) == (c.shape, c.stride(), c.dtype)
        assert a.untyped_storage()._cdata != b.untyped_storage()._cdata


def test_other_arguments_are_another_operation():
    """1, 1.0 and True are equal, and make different dtypes."""
    repeats = Repeats()
    found = [repeats.run(aten.add.Tensor, (meta(2, dtype=torch.int32), one), {}).dtype for one in (1, 1.0, True)]
    assert found == [torch.int32, torch.float32, torch.int32]
    assert repeats.run(aten.sum.dim_IntList, (meta(3, 4), [0]), {}).shape == (4,)
    assert repeats.run(aten.sum.dim_IntList, (meta(3, 4), [1]), {}).shape == (3,)


def test_what_shares_memory_still_does():
    repeats = Repeats()
    for func, args in ((aten.t.default, ()), (aten._unsafe_view.default, ([12],))):
        for _ in range(2):
            given = meta(3, 4)
            assert repeats.run(func, (given, *args), {}).untyped_storage()._cdata == given.untyped_storage()._cdata


def test_work_in_place_hands_on_its_tensor():
    repeats, given, out = Repeats(), meta(3), meta(3)
    assert repeats.run(aten.mul_.Tensor, (given, 2.0), {}) is given
    assert repeats.run(aten.add.out, (given, given), {"out": out}) is out
    real = torch.ones(3)
    repeats.run(aten.mul_.Tensor, (real, 2.0), {})
    assert real.tolist() == [2.0, 2.0, 2.0]
