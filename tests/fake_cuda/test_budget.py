"""What an ordinary step does on a GPU, held to a budget: launches, waits of the host, bytes between host and device.

    python tests/fake_cuda/test_budget.py

writes ``budget.json`` anew. A change that makes a step do more has to change the budget too, and say why.
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for the command above
from pretended_steps import config_of, take

BUDGET = Path(__file__).with_name("budget.json")
ORDINARY = ("lowrank.update_proj_gap=100",)
TWO = ("train.grad_accumulation=2",)
ROW = "lowrank.group_size=row"
CASES: dict[str, tuple[str, ...]] = {
    "qgalore": (),
    "qgalore, two micro-batches": TWO,
    "streamed": ("memory.stream=all",),
    "int8 products": ("model.compute=int8", ROW),
    "rows": (ROW,),
    "muon": ("lowrank.rule=muon",),
    "fira": ("lowrank.rule=fira",),
    "galore": ("method=galore",),
    "adamw8bit": ("method=adamw8bit",),
    "offloaded, two micro-batches": ("train.activation_checkpointing=offload", *TWO),
    "batch-major": ("train.order=batch_major",),
    "liger": ("model.elementwise=liger",),
}
WITHOUT_KERNELS = ("qgalore", "int8 products", "muon")
QUICK = ("qgalore, two micro-batches",)
SLACK = 1.03  # of launches: versions of torch and transformers take an operation more or less


def counted(folder: Path, name: str, kernels: bool = True) -> dict[str, int]:
    """The figures of the second step, which finds no basis."""
    gap = () if "method=adamw8bit" in CASES[name] else ORDINARY
    if name == "liger":
        pytest.importorskip("liger_kernel")
    account = take(config_of(folder, *CASES[name], *gap), kernels=kernels).steps[1]
    assert "_int8_product_kernel" in account.kernels or not (kernels and name == "int8 products")
    return account.figures()


def all_cases() -> list[tuple[str, str, bool]]:
    """(key of the budget, case, whether kernels are launched)."""
    found = [(name, name, True) for name in CASES]
    return [*found, *((f"{name}, without kernels", name, False) for name in WITHOUT_KERNELS)]


@pytest.mark.parametrize(
    ("key", "name", "kernels"),
    [pytest.param(*case, marks=() if case[0] in QUICK else pytest.mark.slow) for case in all_cases()],
)
def test_a_step_stays_within_its_budget(tmp_path, key, name, kernels):
    budget = json.loads(BUDGET.read_text(encoding="utf-8"))[key]
    found = counted(tmp_path, name, kernels)
    anew = "python tests/fake_cuda/test_budget.py writes the budget anew"
    for what, value in found.items():
        slack = SLACK if what == "launches" else 1.0
        assert value <= budget[what] * slack, f"{what}: {value:,} are more than {budget[what]:,}; {anew}"
        assert value >= budget[what] * 0.5, f"{what}: {value:,}, so the budget can come down; {anew}"


def test_the_host_waits_for_what_is_known():
    """Once for each block, the prologue and the epilogue, for the losses and for the norm that is logged; and for the
    last copies of streamed blocks."""
    blocks = 2
    for key, figures in json.loads(BUDGET.read_text(encoding="utf-8")).items():
        copies = 2 if "streamed" in key else 0
        if key != "batch-major":  # which looks at each tensor when its gradient arrives
            assert figures["waits"] <= blocks + 4 + copies, key


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        figures = {key: counted(Path(folder), name, kernels) for key, name, kernels in all_cases()}
    BUDGET.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
