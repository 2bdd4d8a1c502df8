"""What can be said of the Triton kernels without a GPU: their values, interpreted, and that they compile."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="test_kernels.py runs the kernels on the GPU")

POINTERS = {"q": "*i8", "scale": "*bf16", "codes": "*u8", "basis_scale": "*bf16", "delta": "*fp32", "vectors": "*fp32"}


def test_kernels_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-n", "0", str(Path(__file__).with_name("test_kernels.py"))]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreted kernel is not compiled")
@pytest.mark.parametrize(
    ("name", "constants"),
    [
        ("_dequantize_kernel", {"group": 64, "block": 4096}),
        ("_unpack_kernel", {"block": 4096}),
        ("_pack_kernel", {"group": 64}),
    ],
)
def test_kernels_compile_for_a_gpu_with_correctly_rounded_division(name, constants):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from qgalore.quant import kernels

    kernel = getattr(kernels, name)
    types = {**POINTERS, "out": "*bf16", "s": "fp32", "shrink": "fp32"}
    signature = {a: "constexpr" if a in constants else types.get(a, "i32") for a in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"enable_fp_fusion": False})
    ptx = compiled.asm["ptx"]
    assert "div.full" not in ptx
    assert "div.approx" not in ptx
    assert ("div.rn" in ptx) == (name == "_pack_kernel")
