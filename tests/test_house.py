"""What keeps the code easy to enter: small modules, short functions, imports without a circle."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "qgalore"
MODULES = sorted(PACKAGE.rglob("*.py"))
LINES_OF_A_MODULE = 300
LINES_OF_A_FUNCTION = 50

# Modules that still wait to be split. This set may only lose entries.
TOO_LONG: set[str] = set()

# Pairs of modules that name each other, if only for the type checker. This set may only lose entries.
CIRCLES: set[frozenset[str]] = set()


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def long_modules(limit: int) -> set[str]:
    return {name_of(path) for path in MODULES if len(path.read_text(encoding="utf-8").splitlines()) > limit}


@pytest.mark.parametrize("folder", ["qgalore", "tests", "tools", "configs", "docs", "."])
def test_no_merge_was_left_half_done(folder):
    root = PACKAGE.parent
    kinds = {".py", ".md", ".yaml", ".json", ".toml", ".txt", ".csv"}
    paths = (root / folder).glob("*" if folder == "." else "**/*")
    for path in (path for path in paths if path.suffix in kinds):
        assert not re.search(r"^(<{7}|>{7}) ", path.read_text(encoding="utf-8"), flags=re.M), path


def test_modules_fit_on_a_few_screens():
    assert long_modules(LINES_OF_A_MODULE) - TOO_LONG == set()


def test_what_was_split_does_not_stay_on_the_list():
    assert long_modules(LINES_OF_A_MODULE) >= TOO_LONG


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function's body without its docstring: a signature and its explanation are read by callers."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_functions_fit_on_a_screen(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert body_lines(node) <= LINES_OF_A_FUNCTION, f"{name_of(path)}: {node.name}"


def test_body_lines_leave_out_signature_and_docstring():
    source = 'def f(\n    a,\n    b,\n):\n    """One.\n\n    Two.\n    """\n    x = a\n\n    return x\n'
    assert body_lines(ast.parse(source).body[0]) == 3


def _modules() -> dict[str, tuple[Path, tuple[str, ...]]]:
    """Each module's name within the package → its file and the package that its relative imports start from."""
    found = {}
    for path in MODULES:
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        inside = parts[:-1]
        found[".".join(inside if parts[-1] == "__init__" else parts)] = (path, inside)
    return found


def _imported(path: Path, inside: tuple[str, ...], known: set[str]) -> set[str]:
    """The modules that ``path`` names in an import anywhere, also in a function or under TYPE_CHECKING."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = inside[: len(inside) - node.level + 1]
        module = ".".join((*base, *filter(None, [node.module])))
        for alias in node.names:
            full = f"{module}.{alias.name}".strip(".")
            found.add(full if full in known else module)
    return found & known


def _reachable(start: str, edges: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    waiting = list(edges[start])
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += edges[name]
    return found


def circles(edges: dict[str, set[str]]) -> set[frozenset[str]]:
    """The sets of modules each of which leads to all others of its set."""
    reach = {name: _reachable(name, edges) for name in edges}
    return {frozenset(other for other in reach[name] if name in reach[other]) for name in edges if name in reach[name]}


def test_no_modules_import_each_other():
    modules = _modules()
    edges = {name: _imported(path, inside, set(modules)) - {name} for name, (path, inside) in modules.items()}
    assert circles(edges) == CIRCLES


def test_a_circle_is_found_over_any_number_of_modules():
    edges = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}
    assert circles(edges) == {frozenset({"a", "b", "c"})}


def test_imports_for_the_type_checker_count(tmp_path):
    path = tmp_path / "one.py"
    path.write_text("if TYPE_CHECKING:\n    from .two import Two\nfrom .. import three\n")
    assert _imported(path, ("room",), {"room.two", "three", "room"}) == {"room.two", "three"}


def test_no_two_test_modules_have_one_name():
    """Processes that a test starts import its module by name, from the first folder that has one."""
    names = [path.name for path in Path(__file__).parent.rglob("*.py") if path.name != "conftest.py"]
    assert sorted(names) == sorted(set(names))


def test_no_test_module_imports_another():
    """What several need has a module of its own, such as ``helpers``."""
    for path in Path(__file__).parent.rglob("*.py"):
        found = re.findall(r"^\s*(?:from|import) (test_\w+)", path.read_text(encoding="utf-8"), flags=re.M)
        assert not found, f"{path.name} imports {found[0]}"
