"""What travels inside machines and between them: the formulas against messages that are sent one by one."""

from itertools import pairwise, permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qgalore import config
from qgalore.memory.wire import Cards, Sent, all_sent, busiest, sent
from qgalore.models.compiling import blocks_of
from qgalore.training.model import Vocabulary
from qgalore.training.paper import on_paper

MESHES = [(1, 1, 1), (1, 4, 4), (4, 1, 2), (1, 8, 4), (2, 4, 4), (4, 2, 4), (3, 4, 8), (2, 6, 4), (1, 7, 3), (5, 1, 8)]


def mean(messages: list[tuple[int, int, float]], cards: Cards) -> Sent:
    """Of (from, to, bytes), those inside machines and those between, for each card."""
    machine = [n // cards.per_machine for n in range(cards.size)]
    crossing = sum(size for one, other, size in messages if machine[one] != machine[other])
    return Sent((sum(size for *_, size in messages) - crossing) / cards.size, crossing / cards.size)


def round_trip(group: list[int], size: float) -> list[tuple[int, int, float]]:
    """An all-gather, or a reduce-scatter: in each round every card hands a share of ``size`` on to the next one."""
    rounds = len(group) - 1
    return [(n, group[(k + 1) % len(group)], size / len(group)) for _ in range(rounds) for k, n in enumerate(group)]


def same(found: Sent, wanted: Sent) -> bool:
    return found.inside == pytest.approx(wanted.inside) and found.between == pytest.approx(wanted.between)


@pytest.mark.parametrize("sizes", MESHES)
def test_gathering_goes_round_each_copy(sizes):
    cards = Cards(*sizes)
    groups = [[r * cards.shards + s for s in range(cards.shards)] for r in range(cards.replicas)]
    wanted = mean([message for group in groups for message in round_trip(group, 24.0)], cards)
    assert same(sent("gather blocks", 24.0, cards), wanted)


@pytest.mark.parametrize("sizes", MESHES)
def test_a_sum_for_all_goes_round_twice(sizes):
    cards = Cards(*sizes)
    wanted = mean(2 * round_trip(list(range(cards.size)), 24.0), cards)
    assert same(sent("all-reduce dense gradients", 24.0, cards), wanted)


@pytest.mark.parametrize("collective", ["reduce Δ gradients", "broadcast matrices"])
@pytest.mark.parametrize("sizes", MESHES)
def test_what_goes_to_or_from_an_owner_passes_every_other_card_once(sizes, collective):
    """Whoever is the owner: on average over all of them."""
    cards, messages = Cards(*sizes), []
    for owner in range(cards.size):
        chain = [(owner + k) % cards.size for k in range(cards.size)]
        messages += [(one, other, 24.0 / cards.size) for one, other in pairwise(chain)]
    assert same(sent(collective, 24.0, cards), mean(messages, cards))


@pytest.mark.parametrize("sizes", MESHES)
def test_an_owner_hands_each_card_of_its_copy_its_rows_and_these_pass_them_on(sizes):
    cards = Cards(*sizes)
    groups = [list(copy) for copy in cards.copies()]
    pairs = [pair for group in groups for pair in permutations(group, 2)]
    messages = [(owner, other, 24.0 / cards.size / cards.shards) for owner, other in pairs]
    assert same(sent("hand out rows", 24.0, cards), mean(messages, cards))
    messages = []
    for first in range(cards.replicas):  # whoever's copy the owner is in: on average over all of them
        for share in range(cards.shards):
            chain = [(first + k) % cards.replicas * cards.shards + share for k in range(cards.replicas)]
            size = 24.0 / cards.shards / cards.replicas
            messages += [(one, other, size) for one, other in pairwise(chain)]
    assert same(sent("pass rows on", 24.0, cards), mean(messages, cards))
    assert ("pass rows on" in all_sent({"hand out rows": 24.0}, cards)) == (cards.replicas > 1)


def test_copies_that_fit_into_a_machine_are_gathered_inside_it():
    assert sent("gather blocks", 8.0, Cards(4, 8, 8)) == Sent(7.0, 0.0)
    assert sent("gather blocks", 8.0, Cards(1, 32, 8)).between > 0.0


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 12))
def test_one_machine_has_no_network(replicas, shards, spare):
    cards = Cards(replicas, shards, replicas * shards + spare)
    for name in ("gather blocks", "all-reduce x", "reduce x", "broadcast x", "hand out rows", "pass rows on"):
        assert sent(name, 1.0, cards).between == 0.0
    assert cards.machines == 1


def test_the_busiest_owner_hands_out_its_largest_matrix():
    small = ["model.overrides={vocab_size: 512, num_hidden_layers: 2}", "memory.budget=null"]
    given = config.resolve(config.load("quickstart.yaml", small), "cuda", True, 1)
    model, optimizer = on_paper(given, Vocabulary(512, None, None))
    largest, block, embedding = 256 * 704, 4 * 256 * 256 + 3 * 256 * 704, 512 * 256 * 2
    wanted = 100 * (2 * largest + embedding) / (2 * block + embedding)
    assert busiest(blocks_of(model), optimizer.tensors, 100) == pytest.approx(wanted)
    assert busiest(blocks_of(model), optimizer.tensors, 1) == 1.0
