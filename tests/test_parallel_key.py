"""The key ``parallel``: words and sizes, what they come to in so many processes, and what a resume makes of them."""

import pytest
import torch
import yaml

from qgalore import config
from qgalore.config import Mesh
from qgalore.errors import ConfigError
from qgalore.parallel import Team
from qgalore.training import assemble

LEAST = {"model": {"config": "llama_60m"}, "data": {"train": "x.txt"}, "train": {"max_steps": 10, "lr": 0.01}}
RIGHT = {"lowrank": {"proj_type": "right"}}
BOTH = {"replicate": 2, "shard": 4}


def made(parallel, **sections):
    return config.parse({**LEAST, **RIGHT, **sections, "parallel": parallel}, "mine.yaml")


@pytest.mark.parametrize(
    ("written", "processes", "sizes", "splits"),
    [
        ("replicate", 8, (8, 1), False),
        ("shard", 8, (1, 8), True),
        (BOTH, 8, (2, 4), True),
        ({"replicate": 8, "shard": 1}, 8, (8, 1), False),
        ("shard", 1, (1, 1), False),
        (BOTH, 1, (1, 1), False),
    ],
)
def test_what_is_written_is_a_mesh_of_so_many_processes(written, processes, sizes, splits):
    mesh = made(written).parallel.over(processes)
    assert (mesh.replicas, mesh.shards, mesh.splits) == (*sizes, splits)


@pytest.mark.parametrize("written", ["replicate", "shard", BOTH])
def test_it_reads_back_from_a_dump_and_a_checkpoint(written):
    before = made(written)
    assert yaml.safe_load(config.dump(before))["parallel"] == written
    assert config.parse(yaml.safe_load(config.dump(before)), "dump") == before
    saved = before.model_dump(mode="json")
    assert saved["parallel"] == written, "earlier versions wrote the word alone"
    for other in ("replicate", "shard", BOTH, {"replicate": 4, "shard": 1}):
        assert config.differences(saved, made(other)) == []


def test_an_override_has_both_sizes():
    assert config.load("quickstart.yaml", ["parallel={replicate: 3, shard: 1}"]).parallel == Mesh(3, 1)


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("shards", ["parallel is 'shards'; it must be replicate or shard, or a mapping", "Did you mean shard?"]),
        ({"replicate": 2}, ["parallel is {replicate: 2}; ", "for example parallel={replicate: 2, shard: 4}"]),
        ({"replicate": 0, "shard": 4}, ["parallel is {replicate: 0, shard: 4}; ", "a size from 1 to 65,536"]),
        ({"replicate": True, "shard": 4}, ["parallel is {replicate: true, shard: 4}; "]),
        ({"replicate": 2, "shard": 4.0}, ["parallel is {replicate: 2, shard: 4}; "]),
        ({"replicate": 2, "shard": 2**16 + 1}, ["parallel is {replicate: 2, shard: 65537}; "]),
        ({**BOTH, "expert": 2}, ["parallel is a mapping of 3 keys; "]),
    ],
)
def test_what_is_no_mesh_is_told_in_words(written, words):
    with pytest.raises(ConfigError) as error:
        made(written)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_sizes_of_another_number_of_processes_are_refused_with_sizes_that_fit():
    asked = made(BOTH, train={**LEAST["train"], "grad_accumulation": 6})
    with pytest.raises(ConfigError) as error:
        config.resolve(asked, "cpu", False, 6)
    said = str(error.value)
    assert "parallel is {replicate: 2, shard: 4}, a mesh of 8 processes, and there are 6 (WORLD_SIZE" in said
    assert "'parallel={replicate: 3, shard: 2}'" in said
    config.resolve(made({"replicate": 3, "shard": 2}, train=asked.train.model_dump()), "cpu", False, 6)


def test_what_shard_does_not_go_with_sizes_do_not_either():
    with pytest.raises(ConfigError, match=r"lora does not go with parallel: \{replicate: 2, shard: 4\}"):
        made(BOTH, method="lora")
    assert made({"replicate": 8, "shard": 1}, method="lora").parallel.over(8) == Mesh(8, 1)


def announced(parallel, processes, folder, capsys) -> str:
    """What a run in so many processes says of them at its beginning."""
    asked = made(parallel, train={**LEAST["train"], "grad_accumulation": processes})
    team = Team(0, processes)
    assemble._announce(config.resolve(asked, "cpu", False, processes), folder, torch.device("cpu"), team, [])
    return capsys.readouterr().out


def test_shares_that_leave_a_machine_are_told(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert "over machines" not in announced({"replicate": 2, "shard": 8}, 16, tmp_path, capsys), "nobody knows"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    told = announced({"replicate": 2, "shard": 8}, 16, tmp_path, capsys)
    assert "{replicate: 2, shard: 8} splits a copy over machines, which have 4 processes each" in told
    assert "over machines" in announced({"replicate": 4, "shard": 3}, 12, tmp_path, capsys), "3 + 1, 2 + 2"
    assert "over machines" not in announced({"replicate": 4, "shard": 2}, 8, tmp_path, capsys)
    assert "over machines" not in announced("shard", 8, tmp_path, capsys), "it was asked for"


def test_one_process_says_that_sizes_have_no_effect(tmp_path, capsys):
    assert "parallel: {replicate: 2, shard: 4} has no effect in one process" in announced(BOTH, 1, tmp_path, capsys)
    assert "parallel: shard has no effect in one process" in announced("shard", 1, tmp_path, capsys)
    assert "no effect" not in announced("replicate", 1, tmp_path, capsys)
