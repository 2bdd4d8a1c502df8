"""The plan of several cards as a user reads it: by link, and with the tokens that hide what is sent."""

import re

import pytest

from qgalore import config, speed
from qgalore.cli import plan, train
from qgalore.errors import ConfigError
from qgalore.memory.wire import Cards, Sent
from qgalore.speed import links
from qgalore.training.cluster import AGAIN, Machines, Wire
from qgalore.training.model import Vocabulary
from qgalore.training.roofline import seconds_of_a_token

SMALL = (
    "model.overrides={num_hidden_layers: 2, hidden_size: 512, intermediate_size: 1024, num_attention_heads: 8, "
    "vocab_size: 512}",
    "lowrank.rank=64",
)


def printed(capsys, *arguments: str) -> str:
    assert plan.main(["--config", "llama7b_16gb.yaml", *arguments, *SMALL, "train.grad_accumulation=16"]) == 0
    return capsys.readouterr().out


def tokens(text: str) -> int:
    return int(re.search(r"hides what travels beside it from ([\d,]+) tokens of a card on", text)[1].replace(",", ""))


def test_the_plan_of_two_machines_tells_links_apart(capsys):
    shown = printed(capsys, "--world-size", "16")
    assert re.search(r"^wire: .* counted, not measured: .* inside machines of 8, .* between them$", shown, flags=re.M)
    rows = re.findall(r"^  (?:all-reduce|broadcast).*?([\d.]+) ([KM])iB +([\d.]+) ([KM])iB$", shown, flags=re.M)
    assert len(rows) >= 3
    for inside, unit, between, other in rows:
        sizes = [float(x) * (1024 if kind == "M" else 1) for x, kind in ((inside, unit), (between, other))]
        assert sizes[0] == pytest.approx(7 * sizes[1], rel=0.02), "one card of eight sends to the other machine"
    assert "host:      8 processes of one machine take " in shown
    assert "By arithmetic, not measured, for the H100 with 450 GB/s (NVLink 4) inside a machine and 50 GB/s" in shown


def test_slower_links_need_more_tokens(capsys):
    usual = tokens(printed(capsys, "--world-size", "16"))
    slow = tokens(printed(capsys, "--world-size", "16", "--link-between", "5"))
    assert slow == pytest.approx(10 * usual, rel=0.03), "there the network is the bottleneck, at a tenth of its rate"
    inside = printed(capsys, "--world-size", "16", "--per-machine", "16", "--card", "A100")
    assert "for the A100 with 300 GB/s (NVLink 3)\n" in inside
    assert " between" not in inside[inside.index("wire:") :]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--card", "H100"], "--card tells of a job on several cards; add --world-size N"),
        (["--link-between", "5"], "--link-between tells of a job"),
        (["--world-size", "8", "--link-inside", "0"], "not a number from 0.001"),
        (["--world-size", "8", "--per-machine", "0"], "not a whole number from 1"),
    ],
)
@pytest.mark.parametrize("parse", [plan.parse, lambda given, name: train.parse([*given, "--plan"], name)])
def test_options_that_mean_nothing_are_refused(parse, arguments, why, capsys):
    with pytest.raises(SystemExit):
        parse(["--config", "quickstart.yaml", *arguments], "plan")
    assert why in capsys.readouterr().err


def test_a_card_that_is_not_known_is_refused_before_anything_is_planned():
    with pytest.raises(ConfigError, match="'Abacus' is not in the table"):
        Machines(card="Abacus")


def test_the_wire_takes_as_long_as_the_busier_link_of_each_collective():
    inside, between = links.Link("a", 4.0), links.Link("b", 1.0)
    assert links.seconds([(8e9, 1e9), (4e9, 3e9)], inside, between) == pytest.approx(2.0 + 3.0)


def test_tokens_hide_both_directions_but_not_what_owners_hand_out():
    """Half of what is gathered, and no more, comes before the blocks work forward. A busy owner counts as it is."""
    card = Machines(card="H100", inside=1.0, between=1.0).linked_card()
    sent = {"gather blocks": Sent(4e9, 0.0), "reduce Δ gradients": Sent(0.0, 3e9), "all-reduce x": Sent(1e9, 0.0)}
    sent |= {"hand out rows": Sent(1e9, 0.5e9), "gather matrices": Sent(0.25e9, 0.5e9)}
    wire = Wire(Cards(1, 4, 2), sent, uneven=5.0)
    assert wire.seconds(card) == pytest.approx((2.0, 2.0 + 3.0 + 1.0, 5.0 + 0.5))
    assert wire.tokens_to_hide(card, (0.5, 1.0)) == pytest.approx(6.0)
    assert wire.tokens_to_hide(card, (0.1, 1.0)) == pytest.approx(20.0)


def test_clipped_steps_gather_what_is_split_once_more(capsys):
    """Neither forward nor beside any work, so no token hides that. What is whole does not come at all."""
    plain, clipped = (
        printed(capsys, "--world-size", "4", "--link-inside", "0.01", "parallel=shard", f"train.clip_grad_norm={norm}")
        for norm in (0, 1)
    )
    twice, again = (
        re.search(rf"^  {name} +([\d.]+) MiB$", clipped, flags=re.M)[1] for name in ("gather blocks", AGAIN)
    )
    outside = 2 * 512 * 512 * 2 * 3 / 4 / 2**20  # embeddings and head, in bf16, from three others
    assert float(again) == pytest.approx(float(twice) / 2 + outside, abs=0.1)
    assert AGAIN not in plain
    assert tokens(plain) == tokens(clipped)
    waits = [float(re.search(r"It waits ([\d.]+) s", shown)[1]) for shown in (plain, clipped)]
    assert waits[1] - waits[0] == pytest.approx(float(again) * 2**20 / 1e7, rel=0.02)
    assert AGAIN not in printed(capsys, "--world-size", "4", "train.clip_grad_norm=1")


def test_a_token_takes_as_long_as_its_products():
    """Where products are all that takes time: 2 for each weight forward, again when it runs again but for the last of
    a block, 2 for the gradient of its input, and the thin ones of Δ. For the head once more each, and its gradient."""
    layers, width, inner, rank, entries, length = 2, 1024, 4096, 256, 512, 64
    sizes = f"num_hidden_layers: {layers}, hidden_size: {width}, intermediate_size: {inner}, num_attention_heads: 8"
    changes = [f"model.overrides={{{sizes}, vocab_size: {entries}}}", f"lowrank.rank={rank}", "memory.budget=null"]
    changes += [f"data.sequence_length={length}", "train.micro_batch_size=64", "train.activation_checkpointing=true"]
    settings = config.resolve(config.load("llama7b_16gb.yaml", changes), "cuda", True, 1)
    fast = speed.Card("none", 100.0, 100.0, 1e9, 1)
    forward, backward = seconds_of_a_token(settings, Vocabulary(entries, None, None), fast)
    shapes = [(width, width)] * 4 + [(inner, width)] * 2 + [(width, inner)]
    weights, head = layers * sum(a * b for a, b in shapes), width * entries
    thin = layers * sum(2 * rank * (a + b) for a, b in shapes)
    rate = 100e12 * speed.EFFICIENCY["products"]
    assert forward == pytest.approx(2 * weights / rate, rel=0.02)
    unread = 2 * layers * inner * width
    assert backward == pytest.approx((4 * weights - unread + thin + 8 * head) / rate, rel=0.02)
