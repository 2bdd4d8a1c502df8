"""The forms in which a training run launches the kernels, and compiling them for a GPU that is not here.

A form is a kernel with the types of its arguments, its constants, and what Triton may assume of numbers and addresses.
``aligned`` forms are those of a model whose sides are multiples of 16, as all that are shipped have.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton.language as tl

from qgalore.quant import kernels, kernels_products, kernels_write

CAPABILITIES = (75, 80, 86, 89, 90, 100, 120)
_TYPES = {
    "q": "*i8", "scale": "*bf16", "codes": "*u8", "basis_scale": "*bf16", "delta": "*fp32", "vectors": "*fp32",
    "update": "*fp32", "product": "*fp32", "s": "fp32", "shrink": "fp32", "keep": "fp32", "weight": "*bf16",
}  # fmt: skip
_NEVER_ASSUMED = ("s", "shrink", "keep", "key0", "key1", "first_row", "start")


@dataclass(frozen=True)
class Form:
    """``name`` says what it is for; ``types`` adds to the usual ones; ``products``: it multiplies matrices."""

    name: str
    kernel: Any
    constants: dict[str, Any]
    options: dict[str, int] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)
    aligned: bool = True
    products: bool = False


@dataclass(frozen=True)
class Compiled:
    """What a compiler made of a form: ``ptx``, and what a thread and a block of it take."""

    ptx: str
    registers: int
    spilled: int  # bytes of local memory, which registers were spilled to
    shared: int


def _split(tile: dict[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    options = {name: value for name, value in tile.items() if name.startswith("num_")}
    return {name: value for name, value in tile.items() if name not in options}, options


def _formats() -> Iterator[Form]:
    for kind in ("bf16", "fp32"):
        for group in (128, 64, 4096):
            constants = {"group": group, "block": kernels.FLAT}
            name, out = f"dequantize {kind}, group {group}", {"out": f"*{kind}"}
            yield Form(name, kernels._dequantize_kernel, constants, types=out)
        constants = {"group": 128, "block": kernels.SPAN}
        yield Form(f"decode {kind}", kernels._unpack_kernel, constants, types={"out": f"*{kind}"})
    yield Form("encode", kernels._pack_kernel, {"group": 128})


def _merges(capability: int) -> Iterator[Form]:
    operand = tl.float32 if capability < 80 else tl.bfloat16
    for side in ("left", "right"):
        tile, options = _split(kernels_write.merge_tile(side, 128, False))
        constants = {"on_left": side == "left", "operand": operand, **tile}
        for group in (128, 64):
            more = {**constants, "group": group}
            yield Form(f"merge {side}, group {group}", kernels_write._merge_kernel, more, options, products=True)
        kernel, types = kernels_write._product_kernel, {"out": "*fp32"}
        options = _split(kernels_write.merge_tile(side, 128, True))[1]
        yield Form(f"merge {side}, row", kernel, constants, options, types, products=True)
        yield Form(f"merge {side}, row, odd sizes", kernel, constants, options, types, False, True)


def _writes() -> Iterator[Form]:
    for kind in ("fp32", "bf16"):
        types = {"update": f"*{kind}"}
        for group in (128, 64):
            constants, options = _split({**kernels_write.WRITE, "group": group})
            yield Form(f"write {kind}, group {group}", kernels_write._write_kernel, constants, options, types)
        constants, options = _split(kernels_write.ROW)
        yield Form(f"write {kind}, row", kernels_write._write_row_kernel, constants, options, types)
        constants, options = _split(kernels_write.DENSE)
        yield Form(f"write {kind} into bf16", kernels_write._write_dense_kernel, constants, options, types)
    types = {"weight": "*fp32"}
    yield Form("write fp32 into fp32", kernels_write._write_dense_kernel, constants, options, types)


def _int8() -> Iterator[Form]:
    for kind in ("bf16", "fp32"):
        constants, options = _split(kernels_products.TOKENS)
        types = {"values": f"*{kind}", "out": "*i8", "step": "*fp32"}
        for scaled in (False, True):
            name = f"round tokens, {kind}{', scaled' if scaled else ''}"
            kernel = kernels_products._round_tokens_kernel
            yield Form(name, kernel, {**constants, "scaled": scaled}, options, types)
    constants, options = _split(kernels_products.PRODUCT)
    types = {"a": "*i8", "b": "*i8", "step": "*fp32", "bias": "*bf16", "out": "*bf16"}
    kernel = kernels_products._int8_product_kernel
    for name, kinds in {
        "int8 Y = X Wᵀ": (True, True, False),
        "int8 Y = X Wᵀ, bias": (True, True, True),
        "int8 dX = dY W": (False, False, False),
    }.items():
        more = dict(zip(("transposed", "scaled", "biased"), kinds, strict=True))
        yield Form(name, kernel, {**constants, **more}, options, types, products=True)


def forms(capability: int) -> list[Form]:
    """All forms that are launched on a GPU of compute capability ``capability``, 89 for 8.9 say."""
    integers = _int8() if capability >= 80 else ()  # Triton compiles no products of integers for Turing
    return [*_formats(), *_writes(), *_merges(capability), *integers]


def compile_form(form: Form, capability: int) -> Compiled:
    """Compile ``form`` with the compiler that Triton brings; no GPU is needed. Raises what that compiler raises."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = form.kernel.arg_names
    signature = {n: "constexpr" if n in form.constants else {**_TYPES, **form.types}.get(n, "i32") for n in names}
    assumed: dict[tuple[int], list] = {}
    for place, name in enumerate(names):
        pointer = signature[name].startswith("*")
        if name not in form.constants and name not in _NEVER_ASSUMED and (pointer or form.aligned):
            assumed[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=form.kernel, signature=signature, constexprs=form.constants, attrs=assumed)
    options = {**form.options, "enable_fp_fusion": False}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, spilled = _resources(made.asm["cubin"])
    return Compiled(made.asm["ptx"], registers, spilled, made.metadata.shared)


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers of a thread, bytes that it keeps in local memory) of the one kernel in ``cubin``."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of registers: {text[:200]!r}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local
