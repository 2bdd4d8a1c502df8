"""The choice between kernels and reference, and the self-check that it rests on, without a GPU."""

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from qgalore.errors import ConfigError
from qgalore.quant import basis, dense, dispatch, int8, int8_products
from qgalore.quant.self_check import CHECKS, first_failure

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")


@pytest.fixture(autouse=True)
def fresh():
    yield
    dispatch.use("auto", CPU)
    dispatch._say_once.cache_clear()
    dispatch._obstacle_on.cache_clear()


def merge(q, scale, delta, codes, basis_scale, dim, side, *, s, shrink, key, first_row):
    """The reference in the shape of a kernel."""
    vectors = basis.decode(codes, basis_scale, dim, "int4")
    update = (vectors.T @ delta if side == "left" else delta @ vectors).mul_(s)
    int8.write_back(q, scale, lambda a, b: update[a:b], shrink=shrink, key=key, first_row=first_row)


def write_back(q, scale, update, *, s, shrink, key, first_row):
    rows = lambda a, b: update[a:b].float() * s  # noqa: E731
    int8.write_back(q, scale, rows, shrink=shrink, key=key, first_row=first_row)


def write_back_dense(weight, update, *, s, shrink, key, first_row):
    dense.write_back(weight, lambda a, b: update[a:b].float() * s, shrink=shrink, key=key, first_row=first_row)


def int8_product(a, step, b, dtype, *, transposed, scale=None, bias=None):
    y = (a.int() @ (b.T if transposed else b).int()).float() * step
    y = y if scale is None else y * scale.float()
    return (y if bias is None else y + bias.float()).to(dtype)


RIGHT = {
    "dequantize": int8.dequantize,
    "encode_int4": lambda vectors, group: basis.encode(vectors, "int4"),
    "decode_int4": lambda codes, scale, dim, dtype: basis.decode(codes, scale, dim, "int4", dtype),
    "merge": merge,
    "write_back": write_back,
    "write_back_dense": write_back_dense,
    "round_tokens": int8_products.round_tokens,
    "int8_product": int8_product,
}
WRONG = [
    ("dequantize", lambda q, scale, dtype: int8.dequantize(q, scale, torch.bfloat16).to(dtype)),
    ("encode_int4", lambda vectors, group: basis.encode(vectors * (1 + 2**-20), "int4")),
    ("decode_int4", lambda codes, scale, dim, dtype: RIGHT["decode_int4"](codes ^ 0x10, scale, dim, dtype)),
    ("merge", lambda *args, first_row, **options: merge(*args, first_row=0, **options)),
    ("merge", lambda *args, shrink, **options: merge(*args, shrink=0.0, **options)),
    ("merge", lambda *args, key, **options: merge(*args, key=(key[0], key[1] + 1), **options)),
    ("write_back", lambda *args, s, **options: write_back(*args, s=s * (1 + 2**-20), **options)),
    ("write_back", lambda *args, first_row, **options: write_back(*args, first_row=0, **options)),
    ("write_back_dense", lambda *args, key, **options: write_back_dense(*args, key=key[::-1], **options)),
    ("round_tokens", lambda values, scale: int8_products.round_tokens(values, None)),
    ("int8_product", lambda *args, bias=None, **options: int8_product(*args, **options)),
    ("int8_product", lambda a, step, b, *args, **options: int8_product(a, step, b.clamp(-126, 126), *args, **options)),
    ("write_back_dense", lambda *args, shrink, **options: write_back_dense(*args, shrink=0.0, **options)),
]


def test_the_reference_passes_its_own_check():
    assert set(RIGHT) == set(CHECKS)
    assert first_failure(SimpleNamespace(**RIGHT), CPU) is None


@pytest.mark.parametrize(("name", "wrong"), WRONG)
def test_a_wrong_kernel_is_named(name, wrong):
    message = first_failure(SimpleNamespace(**{**RIGHT, name: wrong}), CPU)
    assert f"the kernel {name} differs from the reference on cpu" in message


def test_a_kernel_that_raises_is_named():
    message = first_failure(SimpleNamespace(**{**RIGHT, "decode_int4": lambda *_: 1 / 0}), CPU)
    assert message == "the kernel decode_int4 fails on cpu with ZeroDivisionError: division by zero"


def test_a_cpu_takes_the_reference_silently(capsys):
    dispatch.use("auto", CPU)
    assert dispatch.kernels_for(CPU) is None
    assert dispatch.kernels_for(torch.device("meta")) is None
    assert capsys.readouterr().out == ""


@WITHOUT_GPU
@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_auto_falls_back_where_kernels_do_not_run_and_says_so_once(capsys):
    """A CUDA device that is not there: whatever fails in its first kernel must not stop a run."""
    dispatch.use("auto", CUDA)
    assert dispatch.kernels_for(CUDA) is None
    printed = capsys.readouterr().out
    assert printed.count("the kernel dequantize fails on cuda") == 1
    assert "plain PyTorch is used there" in printed
    with pytest.raises(ConfigError, match="the kernel dequantize fails on cuda"):
        dispatch.use("triton", CUDA)
    assert dispatch.kernels_for(CUDA) is None, "a refused choice must leave the one before"


def test_what_cannot_be_is_refused(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="one of"):
        dispatch.use("cuda", CPU)
    with pytest.raises(ConfigError, match="Triton"):
        dispatch.use("triton", CPU)
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install triton"):
        dispatch.use("triton", CUDA)
    dispatch._obstacle_on.cache_clear()
    dispatch.use("auto", CUDA)
    assert "Triton is not installed" in capsys.readouterr().out


@pytest.mark.parametrize("how", [{"rounding": "nearest"}, {"scales": "rederived"}])
def test_other_rounding_and_scales_have_no_kernel(how, monkeypatch):
    """Even where all kernels work; under ``auto`` the same words are printed and the reference merges."""
    monkeypatch.setattr(dispatch, "_obstacle_on", lambda device: None)
    monkeypatch.setattr(dispatch, "_choice", "triton")
    q, scale = int8.quantize(torch.randn(4, 64), 64)
    where = {"s": 1.0, "shrink": 0.0, "key": (1, 2), **how}
    with pytest.raises(ConfigError, match=f"{next(iter(how.values()))}.* has no kernel"):
        dispatch.merge(q, scale, torch.ones(4, 64), None, None, **where)
