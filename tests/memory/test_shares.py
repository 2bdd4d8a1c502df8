"""What the fullest of several cards keeps, against one process's plan and against sums by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qgalore import config
from qgalore.memory.resident import resident
from qgalore.memory.shares import GATHERED, REDUCED, busiest, share, spread
from qgalore.memory.wire import Cards
from qgalore.models.compiling import blocks_of
from qgalore.training.model import Vocabulary
from qgalore.training.paper import on_paper

WIDTH, INNER, LAYERS, RANK, VOCABULARY = 256, 704, 3, 64, 512
SHAPES = [(WIDTH, WIDTH)] * 4 + [(INNER, WIDTH)] * 2 + [(WIDTH, INNER)]


@pytest.fixture(scope="module")
def made():
    changes = [f"model.overrides={{vocab_size: {VOCABULARY}, num_hidden_layers: {LAYERS}}}", f"lowrank.rank={RANK}"]
    changes += ["memory.budget=null", "lowrank.grad_dtype=float32"]
    given = config.load("quickstart.yaml", changes)
    model, optimizer = on_paper(config.resolve(given, "cuda", True, 1), Vocabulary(VOCABULARY, None, None))
    optimizer.accumulate_in_fp32(True)
    return model, optimizer.tensors


def test_one_card_keeps_what_one_process_does(made):
    codes = 2 * 4 * 256  # the values that 8-bit codes stand for, once for all tensors
    assert share(*made, Cards(1, 1, 1)).kept == sum(resident(*made).values()) - codes


def test_rows_are_split_and_the_rest_is_whole(made):
    one, four, odd = (share(*made, Cards(1, cards, 8)) for cards in (1, 4, 5))
    blocks = four.blocks * 4
    assert four.whole + blocks == one.whole, "704 and 256 rows go by four"
    assert blocks / 5 < odd.blocks < blocks / 4, "the first of five has the longer part"
    assert odd.whole == four.whole
    assert share(*made, Cards(2, 4, 8)).blocks == four.blocks
    assert share(*made, Cards(4, 1, 8)).whole == one.whole


def test_state_is_that_of_owners(made):
    one = share(*made, Cards(1, 1, 1)).state
    shares = [share(*made, Cards(1, cards, 8)) for cards in (2, 4, 64)]
    assert [each.owners for each in shares] == [2, 4, 7 * LAYERS + 1]
    assert one / 2 <= shares[0].state < 0.55 * one
    assert shares[0].state > shares[1].state >= shares[2].state
    embedding = VOCABULARY * WIDTH * 2  # moments of a byte each, and a scale for 256
    assert shares[2].state > embedding, "no card owns less than a matrix, and all step the norms"


def test_at_work_are_whole_blocks_and_the_gradients_of_two(made):
    found = share(*made, Cards(1, 8, 8))
    thin = sum(RANK * max(shape) for shape in SHAPES)
    norms = 2 * WIDTH
    assert found.gradients == REDUCED * 4 * (thin + norms)
    assert found.first == REDUCED * 4 * (sum(a * b for a, b in SHAPES) + norms)
    blocks = share(*made, Cards(1, 2, 8)).blocks * 2
    assert found.gathered == GATHERED * blocks // LAYERS
    assert share(*made, Cards(8, 1, 8)).gathered == 0


def test_the_busiest_owner_hands_out_its_largest_matrix(made):
    model, tensors = made
    largest, whole = WIDTH * INNER, sum(a * b for a, b in SHAPES)
    assert busiest(blocks_of(model), tensors, 100) == pytest.approx(100 * largest / whole)
    assert busiest(blocks_of(model), tensors, 1) == 1.0


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=30), st.integers(1, 12))
def test_loads_are_nearly_even_and_nothing_is_lost(sizes, cards):
    loads = spread(sizes, cards)
    assert len(loads) == cards
    assert sum(loads) == sum(sizes)
    assert max(loads) <= max(max(sizes), sum(sizes) / cards * 4 / 3 + max(sizes) / 3)
