"""The architecture as a test: imports point down, and only the top knows the configuration."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "qgalore"
FLOORS = (
    {"combinations", "errors", "plain_yaml", "replacing", "schedule_defaults"},
    {"config", "quant", "parallel"},
    {"lowrank", "data"},
    {"files", "steps", "evaluation", "convergence"},
    {"models", "hugging_face"},
    {"memory", "speed"},
    {"training", "library"},
    {"comparison", "doctor"},
    {"cli"},
)
MODULES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    """The folder or module directly under the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    found = set()
    parts = ("qgalore", *path.relative_to(PACKAGE).with_suffix("").parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(parts[: -node.level]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            names = [f"{module}.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("qgalore.")}
    return found


def floor(name: str) -> int:
    return next(level for level, rooms in enumerate(FLOORS) if name in rooms)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_to_lower_floors(path):
    own = room(path)
    if own == "__init__":
        return
    for other in imported_rooms(path) - {own}:
        assert floor(other) < floor(own), f"{path.name} ({own}) imports {other}, which is not below it"


def test_every_room_is_on_a_floor():
    rooms = {room(path) for path in MODULES} - {"__init__"}
    assert rooms <= set().union(*FLOORS)


def test_no_room_below_training_knows_the_configuration():
    users = {room(path) for path in MODULES if "config" in imported_rooms(path)}
    assert users - {"config"} <= {"training", "cli", "doctor"}


def test_train_script_is_short():
    assert len((PACKAGE.parent / "train.py").read_text(encoding="utf-8").splitlines()) < 60


def test_the_import_reader_sees_relative_imports(tmp_path):
    assert imported_rooms(PACKAGE / "training" / "assemble.py") >= {"memory", "config", "lowrank", "models"}


def test_the_page_of_the_architecture_has_these_floors():
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) \| (`.*?`) \|", page, flags=re.M)
    named = [(int(number), room) for number, rooms in rows for room in re.findall(r"`(\w+)`", rooms)]
    assert sorted(named) == sorted((level + 1, room) for level, rooms in enumerate(FLOORS) for room in rooms)


def test_nobody_outside_asks_what_kind_of_tensor_it_is():
    """What a trained tensor does differently it does itself."""
    kinds = {"DenseTensor", "ProjectedTensor", "WholeTensor", "AdaptiveTensor"}
    for path in MODULES:
        if "tensors" in path.relative_to(PACKAGE).parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
                asked = {part.id for part in ast.walk(node.args[1]) if isinstance(part, ast.Name)}
                assert not asked & kinds, f"{path.relative_to(PACKAGE)}: {ast.unparse(node)}"
