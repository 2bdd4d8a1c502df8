"""Weights that processes split by rows, and the one process that steps each of them for all."""

import pytest
import torch
from jobs import RANK, WIDTH, Chain, chain_of
from processes import run_in
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

import qgalore
from qgalore.config import Mesh
from qgalore.errors import ConfigError
from qgalore.lowrank.layers.linear import LowRankLinear
from qgalore.lowrank.tensors.splitting import split_outside, split_rows
from qgalore.parallel import apart, job, shards
from qgalore.parallel.handing import Handed
from qgalore.parallel.mesh import mesh_of
from qgalore.steps.blocks import Layout
from qgalore.steps.turns import gathered
from qgalore.training.split import split_blocks

SIZE = 3


def test_rows_are_dealt_as_torch_chunks_them():
    for rows in (1, 2, 3, 7, 9, 10):
        whole = torch.arange(rows)
        mine = [shards.share(whole, number, SIZE) for number in range(SIZE)]
        for part, chunk in zip(mine, whole.chunk(SIZE), strict=False):
            assert torch.equal(part, chunk)
        assert torch.equal(torch.cat(mine), whole)


def split_of(team, rows):
    """A stored layer of so many rows, each of which is its number, as this process holds it, and itself whole."""
    block = nn.Sequential(LowRankLinear(torch.zeros(rows, 4), None, rank=2, basis_format="fp32"))
    split_rows([block], mesh_of(team, Mesh(1, team.size), "cpu"))
    numbers = torch.arange(float(rows))[:, None].expand(rows, 4)
    return block[0], numbers


def stored(rows):
    """A layer's weight, filled a few rows at a time, as each process then holds it."""
    with job("cpu") as team:
        layer, numbers = split_of(team, rows)
        for first in range(0, rows, 2):
            layer.store(first, numbers[first : first + 2])
        return shards.local(layer.weight)[:, 0].tolist(), layer.weight.full_tensor()[:, 0].tolist()


@pytest.mark.parametrize("rows", [2, 7])
def test_each_process_stores_its_own_rows_of_a_number_that_does_not_divide(rows):
    found = run_in(SIZE, stored, rows)
    assert [row for mine, _ in found for row in mine] == list(range(rows))
    assert all(whole == list(range(rows)) for _, whole in found)


def handed():
    """What each process keeps of tensors that one of them has changed, one of odd bytes among them."""
    with job("cpu") as team:
        layer, numbers = split_of(team, 5)
        other, _ = split_of(team, 2)
        whole = torch.full((3,), float(team.rank))
        odd = torch.full((5, 4), team.rank, dtype=torch.int8)
        codes = shards.like(layer.weight, torch.zeros(shards.local(layer.weight).shape, dtype=torch.int8))
        team.hand_out(
            [
                Handed(numbers + 10 * team.rank, layer.weight, 1),
                Handed(odd, codes, 2),
                Handed(whole, None, 2),
                Handed(numbers[:2] + 10 * team.rank, other.weight, 2),
            ]
        )
        kept = [shards.local(one)[:, 0].tolist() for one in (layer.weight, codes, other.weight)]
        return kept, whole.tolist()


def test_every_process_gets_its_rows_from_the_one_that_has_changed_them():
    found = run_in(SIZE, handed)
    assert [kept for kept, _ in found] == [
        [[10.0, 11.0], [2, 2], [20.0]],
        [[12.0, 13.0], [2, 2], [21.0]],
        [[14.0], [2], []],
    ]
    assert all(whole == [2.0] * 3 for _, whole in found)


def apart_of():
    """What a process keeps of a tied embedding of five rows between its uses, and what there is in one."""
    with job("cpu") as team:
        embedding, head = nn.Embedding(5, 2), nn.Linear(2, 5, bias=False)
        head.weight = embedding.weight
        with torch.no_grad():
            embedding.weight.copy_(torch.arange(10.0).view(5, 2))
        model = nn.ModuleDict({"embedding": embedding, "block": nn.Linear(2, 2), "head": head})
        split_outside(model, [model["block"]], mesh_of(team, Mesh(1, team.size), "cpu"))
        (one,) = apart.in_model(model)
        found = [one.rows.to_local().numel(), embedding.weight.untyped_storage().nbytes(), embedding.weight.shape]
        with torch.no_grad():
            found.append(model["embedding"](torch.tensor([3])).tolist())
            same = head.weight is embedding.weight and head.weight.untyped_storage().nbytes() >= 40
            apart.drop_all(model)
        return (*found, same, embedding.weight.untyped_storage().nbytes())


def test_embeddings_have_no_memory_but_their_rows_between_their_uses():
    found = run_in(SIZE, apart_of)
    assert [kept for kept, *_ in found] == [4, 4, 2]
    for _, before, shape, row, same, after in found:
        assert (before, tuple(shape), row, same, after) == (4, (5, 2), [[6.0, 7.0]], True, 4)


def owned(rule):
    """Who steps what, and the bytes that each process has for the rule's state."""
    with job("cpu") as team:
        _, optimizer, _ = chain_of(team, "shard", {"rule": rule})
        kept = [value for tensor in optimizer.tensors for value in tensor.tensors().values()]
        bytes_here = sum(value.untyped_storage().nbytes() for value in kept)
        return {tensor.name: tensor.owner for tensor in optimizer.tensors}, bytes_here


def test_matrices_are_dealt_evenly_and_only_their_owners_have_the_state():
    found = run_in(2, owned, "muon")
    for owners, _ in found:
        assert owners == {
            **{"blocks.0.layer": 0, "blocks.1.layer": 1, "blocks.2.layer": 1},
            **{"behind": None, "both": None, "before": None},
        }
    ((_, alone),) = run_in(1, owned, "muon")
    master = 4 * WIDTH  # of the bf16 vector, in both
    assert sum(here for _, here in found) == alone + master


def test_what_is_apart_is_gathered_where_it_is_used_and_for_the_whole_walk_where_blocks_use_it():
    one, two, amid, shared = (nn.Parameter(torch.zeros(2, 2)) for _ in range(4))
    for name, parameter in {"one": one, "two": two, "amid": amid, "shared": shared}.items():
        setattr(parameter, apart.KEPT, name)
    late = {id(one), id(shared)}  # in front and behind, and in front and in a block
    parts = {"outside": [one, two, amid, shared], "before": late, "behind": {id(one), id(two)}, "late": late}
    turns = gathered(Layout("blocks", nn.ModuleList(), None, **parts))
    assert (turns.before, turns.behind, turns.within) == (["one"], ["one", "two"], ["amid", "shared"])


def refused():
    with job("cpu") as team:
        model = Chain(RANK)
        split_rows(model.blocks, mesh_of(team, Mesh(1, team.size), "cpu"))
        with pytest.raises(ConfigError) as error:
            qgalore.optimizer(model, lr=0.1, team=team, stepping="deferred")
        return str(error.value)


def test_hooks_do_not_step_what_is_split():
    assert "stepping" in run_in(2, refused)[0]


class Block(GradientCheckpointingLayer):
    """A block around a layer, which other blocks may have too."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer


def test_blocks_that_have_a_layer_in_common_are_not_split():
    layer = LowRankLinear(torch.zeros(4, 4), None, rank=2)
    with pytest.raises(ConfigError, match="have layers in common; use parallel: replicate"):
        split_blocks(nn.ModuleList([Block(layer), Block(layer)]), None)
    with pytest.raises(ConfigError, match="has no blocks that are known"):
        split_blocks(nn.ModuleList([layer]), None)
