"""Counts in what the programs print: one of a thing is never "1 things"."""

from collections import OrderedDict

import pytest
from torch import nn

from qgalore.errors import counted
from qgalore.models.convert import convert


@pytest.mark.parametrize(
    ("number", "words"), [(0, "0 layers"), (1, "1 layer"), (2, "2 layers"), (12345, "12,345 layers")]
)
def test_a_count(number, words):
    assert counted(number, "layer") == words


def test_a_verb_follows_the_count():
    assert [counted(n, "token has", "tokens have") for n in (1, 2)] == ["1 token has", "2 tokens have"]


def test_a_report_of_one_layer():
    report = str(convert(nn.Sequential(OrderedDict(only=nn.Linear(64, 64))), rank=8))
    assert "in 1 layer;" in report
    assert "in 1 tensor" in report
    assert "1 layers" not in report
