"""What does not go together is stated once and refused at both doors: by a configuration in terms of its keys, and by
``convert()`` and ``optimizer()`` in terms of their arguments."""

import re

import pytest
from conftest import ROOT, TINY
from torch import nn

import qgalore
from qgalore import config
from qgalore.errors import ConfigError

# (what a configuration says, what convert() gets, what optimizer() gets, the same words in both messages)
CONFLICTS = {
    "integers without int8 weights": (
        {"model.compute": "int8", "lowrank.weight_format": "none"},
        {"compute": "int8", "weight_format": "none", "group_size": "row"},
        {},
        ["is for trained int8 weights"],
    ),
    "integers with groups of scales": (
        {"model.compute": "int8", "lowrank.group_size": 64},
        {"compute": "int8", "group_size": 64},
        {},
        ["needs one scale for a row of weights"],
    ),
    "an automatic rank with two bases": (
        {"lowrank.rank": "auto", "lowrank.proj_type": "full"},
        {"rank": "auto", "proj_type": "full"},
        {},
        ["goes by one spectrum"],
    ),
    "a mean rank above its limit": (
        {"lowrank.rank": "auto", "lowrank.max_rank": 16, "lowrank.mean_rank": 24},
        {"rank": "auto", "max_rank": 16, "mean_rank": 24},
        {},
        ["is above max_rank"],
    ),
    "an automatic rank with another rule": (
        {"lowrank.rank": "auto", "lowrank.rule": "fira"},
        {"rank": "auto"},
        {"rule": "fira", "stepping": "fused"},
        ["only rule galore moves ranks"],
    ),
    "APOLLO without a rank": (
        {"lowrank.rank": "full", "lowrank.rule": "apollo"},
        {"rank": None},
        {"rule": "apollo", "stepping": "fused"},
        ["needs the rank of its random projection"],
    ),
    "full gradients that wait": (
        {"lowrank.rule": "fira", "train.stepping": "deferred", "train.order": "batch_major"},
        {},
        {"rule": "fira", "stepping": "deferred"},
        ["would keep those of all layers at once"],
    ),
    "gaps that end before they begin": (
        {"lowrank.max_gap": 10, "lowrank.update_proj_gap": 20},
        {},
        {"max_gap": 10, "update_proj_gap": 20},
        ["where gaps begin"],
    ),
}


def through_keys(changes) -> None:
    data = {**TINY, "data": {**TINY["data"], "train": "x.jsonl"}}
    for name, value in changes.items():
        section, key = name.split(".")
        data[section] = {**data[section], key: value}
    config.parse(data, "here")


def through_arguments(convert, optimizer) -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    qgalore.convert(model, **{"rank": 8, **convert})
    qgalore.optimizer(model, lr=0.1, **optimizer)


@pytest.mark.parametrize("changes, convert, optimizer, words", CONFLICTS.values(), ids=CONFLICTS)  # noqa: PT006
def test_both_doors_refuse_it_in_their_own_terms(changes, convert, optimizer, words):
    with pytest.raises(ConfigError) as of_keys:
        through_keys(changes)
    with pytest.raises(ConfigError) as of_arguments:
        through_arguments(convert, optimizer)
    keys, arguments = str(of_keys.value), str(of_arguments.value)
    for word in words:
        assert word in keys
        assert word in arguments
    named = [key for key in changes if key in keys]
    assert named  # the configuration's message has a key that the user wrote
    assert not re.search(r"\b(lowrank|train|model)\.\w", arguments)  # and the library's has none


def test_both_doors_accept_what_breaks_no_conflict():
    through_keys({"lowrank.rank": "auto", "lowrank.max_rank": 24, "lowrank.mean_rank": 24})
    through_keys({"lowrank.max_gap": 20, "lowrank.update_proj_gap": 20})
    through_arguments({"rank": "auto", "max_rank": 24, "mean_rank": 24}, {"max_gap": 20, "update_proj_gap": 20})
    through_arguments({}, {"rule": "fira", "full_gradients": "keep"})


@pytest.mark.parametrize("words", sorted({word for *_, words in CONFLICTS.values() for word in words}))
def test_each_is_stated_in_one_place(words):
    holding = [p.name for p in (ROOT / "qgalore").rglob("*.py") if words in p.read_text(encoding="utf-8")]
    assert holding == ["combinations.py"]
