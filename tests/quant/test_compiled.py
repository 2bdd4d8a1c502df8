"""The write-back that PyTorch's compiler makes for a CPU, against the reference; slow, because a compiler runs."""

import pytest
import torch

from qgalore.errors import ConfigError
from qgalore.quant import compiled, dispatch, int8
from qgalore.quant.counter import MAX_ELEMENTS, derive_key

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _afterwards():
    yield
    dispatch.use("auto", CPU)
    dispatch._compiler_obstacle.cache_clear()
    dispatch._say_once.cache_clear()


def test_a_machine_without_a_compiler_is_refused(monkeypatch):
    def broken():
        raise FileNotFoundError("no C++ compiler")

    monkeypatch.setattr(compiled, "_function", broken)
    with pytest.raises(ConfigError, match="no C\\+\\+ compiler; set kernels to auto or reference"):
        dispatch.use("compiled", CPU)
    dispatch._compiler_obstacle.cache_clear()
    monkeypatch.setattr(compiled, "_function", lambda: lambda q, scale, *rest: q.zero_())
    with pytest.raises(ConfigError, match="differs from the reference"):
        dispatch.use("compiled", CPU)
    with pytest.raises(ConfigError, match="for a CPU, not for cuda"):
        dispatch.use("compiled", torch.device("cuda"))


def test_a_group_without_compiled_code_takes_the_reference_and_says_so(monkeypatch, capsys):
    monkeypatch.setattr(compiled, "failure", lambda: None)
    monkeypatch.setattr(compiled, "_function", lambda: pytest.fail("called for a group of 33"))
    dispatch.use("compiled", CPU)
    weight = torch.randn(4, 33, generator=torch.Generator().manual_seed(0))
    q, scale = int8.quantize(weight, 33)
    wanted = q.clone()
    dispatch.write_back(q, scale, lambda a, b: torch.zeros(b - a, 33), shrink=0.0, key=(1, 2))
    assert torch.equal(q, wanted)  # no update, no change
    assert "(33 values) has no kernel: plain PyTorch is used there" in capsys.readouterr().out


def test_the_end_of_the_stream():
    q, scale = int8.quantize(torch.ones(1, 128), 128)
    with pytest.raises(ValueError, match=str(MAX_ELEMENTS + 128)):
        compiled.write_back(q, scale, lambda a, b: None, shrink=0.0, key=(1, 2), first_row=MAX_ELEMENTS // 128)


@pytest.mark.slow
def test_equal_in_every_bit_and_compiled_once_for_a_group_size(monkeypatch):
    """Groups that move and that stay, zero groups, several tiles, a late part of a stream, three rates."""
    monkeypatch.setattr(int8, "TILE_ELEMENTS", 5000)
    dispatch.use("compiled", CPU)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    generator = torch.Generator().manual_seed(1)
    for number, (rows, width, group) in enumerate([(70, 256, 128), (9, 96, 32), (33, 384, 128), (200, 32, 32)]):
        weight, update = torch.randn(2, rows, width, generator=generator)
        weight[1] = 0.0
        update *= 10.0 ** torch.randint(-9, 1, (rows, 1), generator=generator)
        stored = int8.quantize(weight, group)
        there = [part.clone() for part in stored]
        options = {"shrink": (0.0, 1e-4, 0.1)[number % 3], "key": derive_key(0, number), "first_row": 1 << 23}
        for write_back, parts in ((dispatch.write_back, there), (int8.write_back, stored)):
            write_back(*parts, lambda a, b, update=update: update[a:b], **options)
        assert torch.equal(there[0], stored[0])
        assert torch.equal(there[1], stored[1])
        assert not torch.equal(stored[1], int8.quantize(weight, group)[1]), "no scale moved"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before <= 2
