"""The roofline: counts of a step against what can be worked out by hand, and a budget that they are held to."""

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qgalore import config, speed
from qgalore.errors import ConfigError
from qgalore.speed import Counts
from qgalore.training import assemble, roofline
from qgalore.training.model import Vocabulary

BUDGET = Path(__file__).with_name("budget.json")
LAYERS = 2
SHAPES = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
WEIGHTS = sum(out * width for out, width in SHAPES)
UNREAD = 4096 * 11008  # of down_proj, whose product a block that runs again leaves out
RANK, TOKENS, VOCABULARY = 1024, 2048, 32128
INT8 = ["model.compute=int8", "lowrank.group_size=row"]


def counted(*overrides: str) -> tuple[Counts, int]:
    changes = [f"model.overrides.num_hidden_layers={LAYERS}", "model.elementwise=plain", *overrides]
    return roofline.counts_for_a_card(config.load("llama7b_16gb.yaml", changes))


@pytest.fixture(scope="module")
def plain() -> Counts:
    return counted()[0]


@pytest.fixture(scope="module")
def integers() -> Counts:
    return counted(*INT8, "train.grad_accumulation=4", "train.stepping=deferred")[0]


@pytest.fixture(scope="module")
def fused() -> Counts:
    pytest.importorskip("liger_kernel")
    return counted("model.elementwise=liger")[0]


def test_products_are_those_of_the_shapes(plain):
    """X Wᵀ twice, as blocks run again but for one product, dY W, and two thin products for Δ; the head twice forward,
    as its chunks run again too, and back for both sides."""
    thin = sum(2 * TOKENS * RANK * (out + width) for out, width in SHAPES)
    blocks = LAYERS * (2 * TOKENS * (3 * WEIGHTS - UNREAD) + thin)
    head = 4 * 2 * TOKENS * VOCABULARY * 4096
    assert plain.products == pytest.approx(blocks + head, rel=1e-3)
    assert plain.integers == 0


def test_the_merge_is_a_product_of_the_rank(plain, integers):
    assert plain.merge == integers.merge == LAYERS * 2 * WEIGHTS * RANK


def test_attention_is_counted_for_causal_rows(plain):
    """Forward, forward again and a backward pass of two and a half; half of two products of the square of the row."""
    assert plain.attention == pytest.approx(LAYERS * 4.5 * 2 * TOKENS**2 * 4096)


def test_integers_take_over_the_products_of_weights(integers):
    assert integers.integers == pytest.approx(4 * LAYERS * 2 * TOKENS * (3 * WEIGHTS - UNREAD))


def test_micro_batches_multiply_all_but_the_update(plain):
    four, tokens = counted("train.grad_accumulation=4", "train.stepping=deferred")
    assert tokens == 4 * TOKENS
    assert four.products == pytest.approx(4 * plain.products, rel=1e-6)
    assert four.merge == plain.merge
    assert four.waits == plain.waits
    assert 3 * plain.launches < four.launches < 4 * plain.launches


def test_fused_kernels_move_half_of_what_a_block_does(plain, fused):
    """The block's optimizer included, which they leave as it is, as they do all other parts."""
    one = "model.overrides.num_hidden_layers=1"
    of_a_block = fused.moved - counted("model.elementwise=liger", one)[0].moved
    assert of_a_block <= 0.5 * (plain.moved - counted(one)[0].moved)
    assert fused.launches < plain.launches
    assert (fused.products, fused.formats, fused.merge) == (plain.products, plain.formats, plain.merge)


@pytest.mark.parametrize("name", ["plain", "integers", "fused"])
def test_counts_stay_within_their_budget(name, request):
    """A change that makes a step do more has to change the budget too, and say why."""
    budget = json.loads(BUDGET.read_text(encoding="utf-8"))[name]
    for key, value in asdict(request.getfixturevalue(name)).items():
        assert value <= budget[key] * 1.02, f"{key}: {value:.4g} is more than {budget[key]:.4g}"
        assert value >= budget[key] * 0.9, f"{key}: {value:.4g} is less than its budget, which can come down"


def test_a_step_of_7b_launches_few_kernels(plain):
    """All 32 layers follow from one: no more than 20,000, and fewer reads than blocks and a handful."""
    deeper = counted("model.overrides.num_hidden_layers=3")[0]
    whole = plain + (deeper + plain * -1.0) * 30
    assert whole.launches <= 20_000
    assert whole.waits <= 32 + 4


def test_counts_are_continued_from_two_blocks():
    """A model of four blocks has the counts that its first two foretell."""
    changes = ["model.overrides.num_hidden_layers=4", "model.overrides.hidden_size=512"]
    resolved = config.resolve(config.load("llama7b_16gb.yaml", changes), "cuda", True, 1)
    vocabulary = Vocabulary(512, None, None)
    (found,) = roofline._continued(resolved, vocabulary, partial(roofline._count, micro_batches=1, recomputed=True))
    wanted = roofline.counts_of(resolved, vocabulary)[0]
    assert asdict(found) == pytest.approx(asdict(wanted))


def test_a_plan_says_last_how_fast_the_smallest_cards_with_room_would_be(capsys):
    small = ["model.overrides.num_hidden_layers=2", "model.overrides.hidden_size=512"]
    assemble.plan(config.load("llama7b_16gb.yaml", small))
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("speed:     tokens/s by arithmetic, unmeasured: RTX 3060 ")
    assemble.plan(config.load("llama7b_16gb.yaml", [*small, "memory.stream=all"]))
    assert capsys.readouterr().out.splitlines()[-1] == "speed:     not counted for blocks that are streamed"
    assemble.plan(config.load("llama7b_16gb.yaml", [*small, "device=cpu", "memory.budget=null"]))
    assert "speed:" not in capsys.readouterr().out, "a CPU is not in the table"


@given(st.floats(1, 1e3), st.floats(0.05, 1.0))
def test_seconds_are_amounts_over_rates(amount, share):
    card = speed.find("RTX 4060 Ti")
    found = {
        p.name: p for p in speed.parts(Counts(products=amount * 1e12, moved=amount * 1e9), card, {"products": share})
    }
    assert found["products, bf16"].seconds == pytest.approx(amount / (44.1 * share))
    assert found["elementwise"].seconds == pytest.approx(amount / (288 * 0.85))
    assert speed.seconds(list(found.values())) == pytest.approx(amount / (44.1 * share) + amount / (288 * 0.85))


def test_a_step_of_many_launches_takes_as_long_as_they_do():
    found = speed.parts(Counts(products=1e6, launches=1e6), speed.find("H100"))
    assert speed.seconds(found) == pytest.approx(1e6 * 6e-6)


@pytest.mark.parametrize(
    ("named", "wanted"),
    [
        ("NVIDIA GeForce RTX 4060 Ti", "RTX 4060 Ti"),
        ("rtx4070ti super", "RTX 4070 Ti Super"),
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("NVIDIA GeForce RTX 5070 Ti", "RTX 5070 Ti"),
    ],
)
def test_cards_are_found_by_what_they_are_called(named, wanted):
    assert speed.find(named).name == wanted


def test_a_card_that_is_not_in_the_table_is_refused_with_those_that_are():
    with pytest.raises(ConfigError, match=r"'Voodoo 2' is not in the table.*RTX 5060 Ti"):
        speed.find("Voodoo 2")
