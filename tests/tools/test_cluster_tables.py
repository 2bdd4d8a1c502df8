"""The tables of several cards: the page shows what the tool prints, of shapes that are as large as they are called."""

import importlib
import sys
from pathlib import Path

import pytest

from qgalore import config
from qgalore.training.model import Vocabulary
from qgalore.training.paper import shape

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    sys.modules.pop("cluster_tables", None)
    return importlib.import_module("cluster_tables")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.slow
def test_the_page_shows_what_is_printed(tool, capsys):
    assert tool.main(["--shapes", "7B", "--cards", "8", "64"]) == 0
    rows = [cells(line) for line in capsys.readouterr().out.splitlines() if line.startswith("| 7B")]
    shown = [cells(line)[:4] for line in PAGE.splitlines() if line.startswith("| 7B")]
    assert len(rows) == 4
    assert rows == shown


@pytest.mark.parametrize("name", ["7B", "32B", "70B", "405B"])
def test_a_shape_is_as_large_as_its_name(tool, name):
    found = tool.SHAPES[name]
    model = shape(config.load(tool.BASE, found.overrides()), Vocabulary(found.vocabulary, None, None))
    values = sum(parameter.numel() for parameter in model.parameters())
    assert values == pytest.approx(float(name.removesuffix("B")) * 1e9, rel=0.04)
    assert found.rank * 4 == model.config.hidden_size
