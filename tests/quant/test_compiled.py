"""The kernels compiled for the GPUs that a user may have: no GPU is needed to see what a compiler makes of them."""

import os
import re
from pathlib import Path

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("an interpreted kernel is not compiled", allow_module_level=True)
import kernel_forms

from qgalore.quant import dispatch

MATRIX = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\S*")
WIDE = re.compile(r"ld\.global\S*\.v4\.b32|cp\.async\.cg|cp\.async\.bulk")
LIMITS = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB of shared memory that one block may have
SHORT = ("merge right, group 128", "write fp32, row", "int8 Y = X Wᵀ, bias", "int8 dX = dY W")


def look(form, capability):
    made = kernel_forms.compile_form(form, capability)
    assert "div.full" not in made.ptx, "a division that is not correctly rounded"
    assert "div.approx" not in made.ptx
    assert made.shared <= LIMITS[capability] * 1024
    assert made.registers <= 255
    if form.aligned:
        assert made.spilled == 0
        if not form.name.startswith(("encode", "decode")):  # which read a byte for two values
            assert WIDE.search(made.ptx), "no load of 16 bytes"
    if form.products and (capability >= 80 or form.name.startswith("int8")):
        kinds = "".join(MATRIX.findall(made.ptx))
        assert kinds, "no matrix instruction"
        assert ("s8" in kinds or "i8" in kinds) if form.name.startswith("int8") else ("bf16" in kinds or "f16" in kinds)
    return made


@pytest.mark.parametrize("name", SHORT)
def test_the_kernels_that_matter_most_compile_for_an_ada_card(name):
    form = next(form for form in kernel_forms.forms(89) if form.name == name)
    look(form, 89)


@pytest.mark.slow
@pytest.mark.parametrize("capability", kernel_forms.CAPABILITIES)
def test_every_form_that_is_launched_compiles(capability):
    for form in kernel_forms.forms(capability):
        look(form, capability)


def test_forms_are_told_apart():
    for capability in kernel_forms.CAPABILITIES:
        names = [form.name for form in kernel_forms.forms(capability)]
        assert len(names) == len(set(names))


def test_every_kernel_has_a_form():
    """Found in the source, so that a new kernel without one fails here."""
    folder = Path(dispatch.__file__).parent
    text = "".join(path.read_text(encoding="utf-8") for path in folder.glob("kernels*.py"))
    written = set(re.findall(r"^def (_\w+_kernel)\(", text, flags=re.M))
    assert written == {form.kernel.fn.__name__ for form in kernel_forms.forms(89)}
